// ambient: the redirection of one pod in ambient mode, written by the code of Istio's node agent into the network namespace it runs in.
//
// The argument is one JSON object: the pod's "annotations", what the agent was started with ("ipv6", "dns_capture"), and
// the "backend": "nft" or "legacy" iptables, or "nftables" for the rules that it writes without iptables.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"istio.io/api/annotation"
	"istio.io/istio/cni/pkg/config"
	"istio.io/istio/cni/pkg/iptables"
	"istio.io/istio/cni/pkg/nodeagent"
	"istio.io/istio/cni/pkg/trafficmanager"
	"istio.io/istio/cni/pkg/util"
	"istio.io/istio/pkg/log"
	"istio.io/istio/tools/istio-iptables/pkg/dependencies"
)

type request struct {
	Annotations map[string]string `json:"annotations"`
	IPv6        bool              `json:"ipv6"`
	DNSCapture  bool              `json:"dns_capture"`
	Backend     string            `json:"backend"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	var asked request
	if len(os.Args) != 2 {
		return fmt.Errorf("usage: ambient JSON")
	}
	if err := json.Unmarshal([]byte(os.Args[1]), &asked); err != nil {
		return fmt.Errorf("the argument is no request: %w", err)
	}
	settings := &config.AmbientConfig{
		EnableIPv6:             asked.IPv6,
		RedirectDNS:            asked.DNSCapture,
		HostProbeSNATAddress:   nodeagent.HostProbeSNATIP,
		HostProbeV6SNATAddress: nodeagent.HostProbeSNATIPV6,
	}
	_, pod, err := trafficmanager.NewTrafficRuleManager(&trafficmanager.TrafficRuleManagerConfig{
		NativeNftables: asked.Backend == "nftables",
		HostConfig:     settings,
		PodConfig:      settings,
		HostDeps:       &dependencies.RealDependencies{ForceIptablesBinary: asked.Backend},
		PodDeps:        &dependencies.RealDependencies{ForceIptablesBinary: asked.Backend, UsePodScopedXtablesLock: true},
		NlDeps:         iptables.RealNlDeps(),
	})
	if err != nil {
		return err
	}
	return pod.CreateInpodRules(log.RegisterScope("ambient", "the rules of one pod"), overrides(asked.Annotations))
}

// overrides are what a pod's annotations change. The agent's own function for it is not exported; how it reads a boolean is.
func overrides(annotations map[string]string) config.PodLevelOverrides {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: annotations}}
	var found config.PodLevelOverrides
	found.IngressMode, _ = util.CheckBooleanAnnotation(pod, annotation.AmbientBypassInboundCapture.Name)
	if capture, said := util.CheckBooleanAnnotation(pod, annotation.AmbientDnsCapture.Name); said {
		found.DNSProxy = config.PodDNSDisabled
		if capture {
			found.DNSProxy = config.PodDNSEnabled
		}
	}
	for _, name := range strings.Split(annotations[annotation.IoIstioRerouteVirtualInterfaces.Name], ",") {
		if trimmed := strings.TrimSpace(name); trimmed != "" {
			found.VirtualInterfaces = append(found.VirtualInterfaces, trimmed)
		}
	}
	return found
}
