# shellcheck shell=bash disable=SC2154
# What Istio's images hold beside the programs, and its charts.
after_build() {
	install -D -m 644 "$module/tools/packaging/common/envoy_bootstrap.json" share/envoy_bootstrap.json
	cp -r --no-preserve=mode "$module/manifests" share/manifests
}
