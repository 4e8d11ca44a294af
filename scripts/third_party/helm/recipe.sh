# shellcheck shell=bash disable=SC2034
# Which Kubernetes 'helm template' takes for granted; releases of Helm have it set so.
ldflags='-X helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor=1 -X helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor=34'
