# shellcheck shell=bash disable=SC2034,SC2154
base=k8s.io/component-base/version
ldflags="-X $base.gitVersion=$version -X $base.gitMajor=1 -X $base.gitMinor=34"

after_build() {
	local component
	for component in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet; do
		ln -s hyperkube "bin/$component"
	done
}
