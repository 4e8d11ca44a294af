// Verdicts of cyclonus, the NetworkPolicy conformance suite of the Kubernetes network policy working group.
//
// One case per line of standard input, one answer per line of standard output. A case is a list of NetworkPolicies, the
// ends of flows, and the flows; the answer says of each flow whether it leaves its source and enters its destination.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	"github.com/mattfenwick/cyclonus/pkg/matcher"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
)

const longestLine = 16 << 20

type testCase struct {
	Policies []*networkingv1.NetworkPolicy `json:"policies"`
	Ends     []end                         `json:"ends"`
	Flows    []flow                        `json:"flows"`
}

// end is a pod, or, without a namespace, an address outside of the cluster.
type end struct {
	Address         string            `json:"address"`
	Namespace       string            `json:"namespace"`
	Labels          map[string]string `json:"labels"`
	NamespaceLabels map[string]string `json:"namespaceLabels"`
}

// flow names its ends by their place; portName is the destination's container port with that number and protocol.
type flow struct {
	Source      int             `json:"source"`
	Destination int             `json:"destination"`
	Protocol    corev1.Protocol `json:"protocol"`
	Port        int             `json:"port"`
	PortName    string          `json:"portName"`
}

type verdict struct {
	Egress  bool `json:"egress"`
	Ingress bool `json:"ingress"`
}

func (e end) peer() *matcher.TrafficPeer {
	if e.Namespace == "" {
		return &matcher.TrafficPeer{IP: e.Address}
	}
	return &matcher.TrafficPeer{IP: e.Address, Internal: &matcher.InternalPeer{
		PodLabels: e.Labels, NamespaceLabels: e.NamespaceLabels, Namespace: e.Namespace,
	}}
}

// setDefaults fills in what the API server does before anybody reads a policy; cyclonus takes it for done.
func setDefaults(policy *networkingv1.NetworkPolicy) {
	if len(policy.Spec.PolicyTypes) > 0 {
		return
	}
	policy.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	if len(policy.Spec.Egress) > 0 {
		policy.Spec.PolicyTypes = append(policy.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
	}
}

func (c testCase) verdicts() []verdict {
	for _, policy := range c.Policies {
		setDefaults(policy)
	}
	built := matcher.BuildNetworkPolicies(false, c.Policies)
	found := make([]verdict, 0, len(c.Flows))
	for _, flow := range c.Flows {
		result := built.IsTrafficAllowed(&matcher.Traffic{
			Source: c.Ends[flow.Source].peer(), Destination: c.Ends[flow.Destination].peer(),
			ResolvedPort: flow.Port, ResolvedPortName: flow.PortName, Protocol: flow.Protocol,
		})
		found = append(found, verdict{Egress: result.Egress.IsAllowed(), Ingress: result.Ingress.IsAllowed()})
	}
	return found
}

func run() error {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, longestLine)
	answers := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var asked testCase
		if err := json.Unmarshal(lines.Bytes(), &asked); err != nil {
			return err
		}
		if err := answers.Encode(asked.verdicts()); err != nil {
			return err
		}
	}
	return lines.Err()
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
