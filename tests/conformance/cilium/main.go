// Verdicts of Cilium's own policy engine, for comparison with ours.
//
// One case per line of standard input, one answer per line of standard output. A case is a cluster and the policies in
// it; the answer says which policies Cilium refuses and, for every pod, direction, peer and probe, whether a new flow
// passes. Everything is done by Cilium: labels of identities, parsing, selectors, the policy map and its lookup.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"strings"

	"github.com/cilium/cilium/pkg/crypto/certificatemanager"
	"github.com/cilium/cilium/pkg/endpoint/regeneration"
	envoypolicy "github.com/cilium/cilium/pkg/envoy/policy"
	"github.com/cilium/cilium/pkg/identity"
	"github.com/cilium/cilium/pkg/identity/identitymanager"
	ipcachetypes "github.com/cilium/cilium/pkg/ipcache/types"
	"github.com/cilium/cilium/pkg/k8s"
	v2 "github.com/cilium/cilium/pkg/k8s/apis/cilium.io/v2"
	slim_networkingv1 "github.com/cilium/cilium/pkg/k8s/slim/k8s/api/networking/v1"
	k8sutils "github.com/cilium/cilium/pkg/k8s/utils"
	"github.com/cilium/cilium/pkg/labels"
	"github.com/cilium/cilium/pkg/labelsfilter"
	"github.com/cilium/cilium/pkg/option"
	"github.com/cilium/cilium/pkg/policy"
	"github.com/cilium/cilium/pkg/policy/api"
	policytypes "github.com/cilium/cilium/pkg/policy/types"
	policyutils "github.com/cilium/cilium/pkg/policy/utils"
	ciliumtypes "github.com/cilium/cilium/pkg/types"
	"github.com/cilium/cilium/pkg/u8proto"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"
)

const clusterName = "default"

type testCase struct {
	Enforcement   string            `json:"enforcement"`
	CidrMatchMode []string          `json:"cidrMatchMode"`
	NodeLabels    bool              `json:"nodeLabels"`
	Pods          []pod             `json:"pods"`
	Others        []other           `json:"others"`
	Policies      []json.RawMessage `json:"policies"`
	Probes        []probe           `json:"probes"`
}

type pod struct {
	Namespace       string            `json:"namespace"`
	Labels          map[string]string `json:"labels"`
	NamespaceLabels map[string]string `json:"namespaceLabels"`
	ServiceAccount  string            `json:"serviceAccount"`
	Address         netip.Addr        `json:"address"`
	Ports           []port            `json:"ports"`
	Groups          []group           `json:"groups"`
}

// GetName and GetLabels make a pod's namespace what Cilium asks it for.
func (p pod) GetName() string              { return p.Namespace }
func (p pod) GetLabels() map[string]string { return p.NamespaceLabels }

type port struct {
	Name     string `json:"name"`
	Port     int    `json:"port"`
	Protocol string `json:"protocol"`
}

// other is whoever is no pod: reserved entities, and an address of the world or of a node.
type other struct {
	Entities   []string          `json:"entities"`
	Address    netip.Addr        `json:"address"`
	NodeLabels map[string]string `json:"nodeLabels"`
	Groups     []group           `json:"groups"`
}

// group is a CiliumCIDRGroup that contains the address.
type group struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels"`
}

type probe struct {
	Protocol uint8  `json:"protocol"`
	Port     uint16 `json:"port"`
}

// answer: Verdicts[pod][direction][peer] has one byte per probe: 1 passes, 7 passes to a proxy, 0 is dropped. Peers are
// the pods, then the others; direction 0 is ingress.
type answer struct {
	Refused  map[string]string `json:"refused"`
	Verdicts [][2][]string     `json:"verdicts"`
}

func main() {
	configure()
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 64<<20)
	out := json.NewEncoder(os.Stdout)
	for in.Scan() {
		var asked testCase
		if err := json.Unmarshal(in.Bytes(), &asked); err != nil {
			fail(err)
		}
		found, err := judge(asked)
		if err != nil {
			fail(err)
		}
		if err := out.Encode(found); err != nil {
			fail(err)
		}
	}
	if err := in.Err(); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// configure gives Cilium the options of an installation for two address families.
func configure() {
	option.Config.ClusterName = clusterName
	option.Config.EnableIPv4 = true
	option.Config.EnableIPv6 = true
	option.Config.EnableICMPRules = true
	option.Config.EnableL7Proxy = true
	option.Config.EnableNonDefaultDenyPolicies = true
	option.Config.UnsafeDaemonConfigOption.AllowLocalhost = option.AllowLocalhostAlways
	api.InitEntities(clusterName)
	if err := labelsfilter.ParseLabelPrefixCfg(quiet(), nil, nil, ""); err != nil {
		fail(err)
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func judge(asked testCase) (answer, error) {
	policy.SetPolicyEnabled(asked.Enforcement)
	option.Config.PolicyCIDRMatchMode = asked.CidrMatchMode
	option.Config.EnableNodeSelectorLabels = asked.NodeLabels
	identities := identity.ListReservedIdentities()
	names := ciliumtypes.NewNamedPortMultiMap()
	endpoints := make([]*endpoint, 0, len(asked.Pods))
	peers := make([]identity.NumericIdentity, 0, len(asked.Pods)+len(asked.Others))
	for i, p := range asked.Pods {
		each, err := newEndpoint(identity.NumericIdentity(1000+i), p)
		if err != nil {
			return answer{}, err
		}
		identities[each.identity.ID] = each.identity.LabelArray
		names.Update(each.identity.ID, nil, each.ports)
		endpoints = append(endpoints, each)
		peers = append(peers, each.identity.ID)
	}
	for i, o := range asked.Others {
		number, lbls := identityOf(i, o)
		identities[number] = lbls.LabelArray()
		peers = append(peers, number)
	}
	repository := policy.NewPolicyRepository(
		quiet(), identities, nil,
		envoypolicy.NewEnvoyL7RulesTranslator(quiet(), certificatemanager.NewMockSecretManagerInline()),
		identitymanager.NewIDManager(quiet()), nil,
	)
	repository.SetNamedPortsGetter(namedPorts{names})
	repository.UpdateIdentities(identities, nil)
	found := answer{Refused: map[string]string{}}
	for _, raw := range asked.Policies {
		if err := load(repository, raw, found.Refused); err != nil {
			return answer{}, err
		}
	}
	for _, each := range endpoints {
		verdicts, err := verdictsAt(repository, each, peers, asked.Probes)
		if err != nil {
			return answer{}, err
		}
		found.Verdicts = append(found.Verdicts, verdicts)
	}
	return found, nil
}

// load adds a policy, or says in refused why Cilium does not take it.
func load(repository *policy.Repository, raw json.RawMessage, refused map[string]string) error {
	var object struct {
		Kind     string `json:"kind"`
		Metadata struct {
			Name      string `json:"name"`
			Namespace string `json:"namespace"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(raw, &object); err != nil {
		return err
	}
	entries, kind, err := parse(object.Kind, raw)
	if err != nil {
		refused[object.Metadata.Name] = err.Error()
		return nil
	}
	resource := ipcachetypes.NewResourceID(kind, object.Metadata.Namespace, object.Metadata.Name)
	repository.ReplaceByResource(entries, resource)
	return nil
}

func parse(kind string, raw json.RawMessage) (policytypes.PolicyEntries, ipcachetypes.ResourceKind, error) {
	switch kind {
	case "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy":
		// Cilium itself reads clusterwide ones into the other type too; without a namespace they are told apart.
		var object v2.CiliumNetworkPolicy
		if err := json.Unmarshal(raw, &object); err != nil {
			return nil, "", err
		}
		rules, err := object.Parse(quiet(), clusterName)
		if err != nil {
			return nil, "", err
		}
		return policyutils.RulesToPolicyEntries(rules), ipcachetypes.ResourceKindCNP, nil
	case "NetworkPolicy":
		var object slim_networkingv1.NetworkPolicy
		if err := json.Unmarshal(raw, &object); err != nil {
			return nil, "", err
		}
		entries, err := k8s.ParseNetworkPolicy(quiet(), clusterName, &object)
		return entries, ipcachetypes.ResourceKindNetpol, err
	case "ClusterNetworkPolicy":
		var object policyv1alpha2.ClusterNetworkPolicy
		if err := json.Unmarshal(raw, &object); err != nil {
			return nil, "", err
		}
		entries, err := k8s.ParseClusterNetworkPolicy(quiet(), clusterName, &object)
		return entries, "kcnp", err
	}
	return nil, "", fmt.Errorf("unknown kind %q", kind)
}

func verdictsAt(
	repository *policy.Repository, at *endpoint, peers []identity.NumericIdentity, probes []probe,
) ([2][]string, error) {
	var found [2][]string
	selected, _, err := repository.ComputeSelectorPolicy(at.identity)
	if err != nil {
		return found, err
	}
	redirects := map[string]uint16{policy.FallbackRedirectID: math.MaxUint16}
	distilled := selected.DistillPolicy(quiet(), at, redirects)
	if err := distilled.Ready(); err != nil {
		return found, err
	}
	distilled.Detach(quiet())
	for direction, key := range []policy.Key{policy.IngressKey(), policy.EgressKey()} {
		for _, peer := range peers {
			var line strings.Builder
			for _, asked := range probes {
				flow := key.WithIdentity(peer).WithPortProto(u8proto.U8proto(asked.Protocol), asked.Port)
				entry, _, _ := distilled.Lookup(flow)
				switch {
				case entry.IsDeny():
					line.WriteByte('0')
				case entry.IsRedirectEntry():
					line.WriteByte('7')
				default:
					line.WriteByte('1')
				}
			}
			found[direction] = append(found[direction], line.String())
		}
	}
	return found, nil
}

// identityOf is what Cilium makes of somebody who is no pod; pkg/ipcache's resolveLabels in short.
func identityOf(index int, o other) (identity.NumericIdentity, labels.Labels) {
	lbls := labels.Labels{}
	for _, entity := range o.Entities {
		label := labels.NewLabel(entity, "", labels.LabelSourceReserved)
		lbls[label.Key] = label
	}
	isNode := lbls.HasHostLabel() || lbls.HasRemoteNodeLabel()
	if isNode && option.Config.PolicyCIDRMatchesNodes() {
		lbls.MergeLabels(labelsOfAddress(o.Address, o.Groups))
	}
	if lbls.HasRemoteNodeLabel() && option.Config.PerNodeLabelsEnabled() {
		nodeLabels, _ := labelsfilter.FilterNodeLabels(labels.Map2Labels(o.NodeLabels, labels.LabelSourceNode))
		lbls.MergeLabels(nodeLabels)
		cluster := map[string]string{"io.cilium.k8s.policy.cluster": clusterName}
		lbls.MergeLabels(labels.Map2Labels(cluster, labels.LabelSourceK8s))
	}
	if reserved := identity.LookupReservedIdentityByLabels(lbls); reserved != nil && (isNode || !o.Address.IsValid()) {
		return reserved.ID, lbls
	}
	if isNode {
		return identity.IdentityScopeRemoteNode | identity.NumericIdentity(index+1), lbls
	}
	lbls.MergeLabels(labelsOfAddress(o.Address, o.Groups))
	lbls.AddWorldLabel(o.Address)
	return identity.IdentityScopeLocal | identity.NumericIdentity(index+1), lbls
}

// labelsOfAddress are those that CIDRs and CIDR groups select by.
func labelsOfAddress(address netip.Addr, groups []group) labels.Labels {
	lbls := labels.Labels{}
	for key, label := range labels.GetCIDRLabels(netip.PrefixFrom(address, address.BitLen())) {
		if label.Source == labels.LabelSourceCIDR {
			lbls[key] = label
		}
	}
	for _, g := range groups {
		name := api.LabelForCIDRGroupRef(g.Name)
		lbls[name.Key] = name
		for key, value := range k8sutils.RemoveCiliumLabels(g.Labels) {
			label := labels.NewLabel(key, value, labels.LabelSourceCIDRGroup)
			lbls[label.Key] = label
			encoded := labels.EncodedCIDRGroupLabel(label.Key, label.Value, label.Source)
			lbls[encoded.Key] = encoded
		}
	}
	return lbls
}

// endpoint is a pod as the policy engine's owner of a policy map.
type endpoint struct {
	identity *identity.Identity
	ports    ciliumtypes.NamedPortMap
}

func newEndpoint(number identity.NumericIdentity, p pod) (*endpoint, error) {
	written := k8sutils.SanitizePodLabels(p.Labels, p, p.ServiceAccount, clusterName)
	lbls, _ := labelsfilter.Filter(labels.Map2Labels(written, labels.LabelSourceK8s))
	if option.Config.PolicyCIDRMatchesPods() {
		lbls.MergeLabels(labelsOfAddress(p.Address, p.Groups))
	}
	ports := ciliumtypes.NamedPortMap{}
	for _, each := range p.Ports {
		if err := ports.AddPort(each.Name, each.Port, each.Protocol); err != nil {
			return nil, err
		}
	}
	return &endpoint{identity.NewIdentity(number, lbls), ports}, nil
}

func (e *endpoint) GetID() uint64                  { return uint64(e.identity.ID) }
func (e *endpoint) PolicyDebug(_ string, _ ...any) {}
func (e *endpoint) IsHost() bool                   { return false }

func (e *endpoint) GetIngressNamedPort(name string, protocol u8proto.U8proto) uint16 {
	if found, ok := e.ports[name]; ok && found.Proto == protocol {
		return found.Port
	}
	return 0
}

func (e *endpoint) PreviousMapStateSizes() policy.MapStateSizes { return policy.MapStateSizes{} }

func (e *endpoint) RegenerateIfAlive(_ *regeneration.ExternalRegenerationMetadata) <-chan bool {
	done := make(chan bool)
	close(done)
	return done
}

type namedPorts struct{ names ciliumtypes.NamedPortMultiMap }

func (n namedPorts) GetNamedPorts() ciliumtypes.NamedPortMultiMap { return n.names }
