package hyperv

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/wsman"
)

// clusterNamespace is where a node tells of its cluster.
const clusterNamespace = "root/MSCluster"

// nodeDown is the State of a node that is not there.
const nodeDown = 1

// A cluster is what the Drivers of one cluster's nodes share. A host of no
// cluster has one, too, of which nobody is a member.
type cluster struct {
	// dial makes a Driver of a node; nil where one host alone is spoken to.
	dial func(node string) (*Driver, error)

	mu      sync.Mutex
	drivers map[string]*Driver // by the node's name in lower case
	names   []string           // of the nodes that were not down when a node was last asked
	alone   bool               // a host said that it is in no cluster, or that we may not know

	volumes map[string]chan struct{} // places on each volume
}

var errSilent = errors.New("no other node answers")

// A place is a host with its VMs.
type place struct {
	d    *Driver
	host string // as it calls itself
	list []system
}

// clusterTries is how often a host is asked for its cluster's nodes.
const clusterTries = 3

// A ClusterError says that nobody knows whether a host is in a cluster: it was
// asked, and neither told nor said that it is in none.
type ClusterError struct{ Err error }

func (e *ClusterError) Error() string {
	return "the host does not say whether it is in a cluster: " + e.Err.Error()
}

// Unwrap gives the reason.
func (e *ClusterError) Unwrap() error { return e.Err }

// noCluster says whether err is a host's word that it is in no cluster, or that
// we may not know. Anything else may pass.
func noCluster(err error) bool {
	for _, none := range []error{wsman.ErrNoClass, fault.ErrNotFound, fault.ErrDenied, fault.ErrUnsupported} {
		if errors.Is(err, none) {
			return true
		}
	}
	return false
}

// nodes are those of the host's cluster that are not down, as the host says, or
// as some node last said if it can't tell. A host that is in no cluster, or
// whose cluster we may not see, has none: it has its own VMs all the same.
func (d *Driver) nodes(ctx context.Context) (names []string, err error) {
	c := d.cluster
	if c.dial == nil || d.members == nil {
		return nil, nil
	}
	for try := 1; ; try++ {
		names, err = d.up(ctx)
		if err == nil || noCluster(err) || try == clusterTries || sleep(ctx, d.poll) != nil {
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		c.names = names
		c.alone = len(c.names) == 0
	case len(c.names) > 0: // they are known from before
	case noCluster(err):
		c.alone = true
	default:
		return nil, &ClusterError{err}
	}
	return slices.Clone(c.names), nil
}

// up asks the host which nodes of its cluster are not down.
func (d *Driver) up(ctx context.Context) (names []string, err error) {
	rows, err := d.members.query(ctx, "SELECT Name, State FROM MSCluster_Node")
	for _, o := range rows {
		if state, ok := o.number("State"); (!ok || state != nodeDown) && o.text("Name") != "" {
			names = append(names, o.text("Name"))
		}
	}
	return names, err
}

// noteRole says that a cluster does not look after a VM that was made on one of
// its nodes, and how it would.
func (m *making) noteRole(ctx context.Context) {
	names, err := m.d.nodes(ctx)
	how := fmt.Sprintf("in PowerShell on a node: Add-ClusterVirtualMachineRole -VMName '%s'", strings.ReplaceAll(m.o.Name, "'", "''"))
	switch {
	case err != nil:
		m.note("%v; if it is, the VM is no role of it, and stays where it is when the host goes down; %s", err, how)
	case len(names) == 0:
	case !isShared(volumeOf(m.folder + `\x`)):
		m.note("the VM is no role of the cluster, and %s is on no shared volume; once its storage was moved to one, %s", m.folder, how)
	default:
		m.note("the VM is no role of the cluster, and stays where it is when the host goes down; %s", how)
	}
}

// known are the nodes as some node last said.
func (c *cluster) known() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.names)
}

// others are the nodes but for the host itself. A host that did not answer a
// moment ago is not asked for them.
func (d *Driver) others(ctx context.Context, answers bool) (names []string, err error) {
	if names = d.cluster.known(); answers {
		names, err = d.nodes(ctx)
	}
	self := d.nodeName()
	return slices.DeleteFunc(names, func(name string) bool { return strings.EqualFold(name, self) }), err
}

// isAlone says whether a host of these is known to be in no cluster.
func (c *cluster) isAlone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.alone || c.dial == nil
}

// at is the Driver of a node.
func (d *Driver) at(node string) (*Driver, error) {
	c, key := d.cluster, strings.ToLower(node)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.drivers[key] == nil {
		n, err := c.dial(node)
		if err != nil {
			return nil, err
		}
		n.node = cmp.Or(n.node, node)
		c.drivers[key] = n
	}
	return c.drivers[key], nil
}

// A NodeError says that a node of a cluster could not be asked.
type NodeError struct {
	Node string
	Err  error
}

func (e *NodeError) Error() string { return fmt.Sprintf("node %s of the cluster: %v", e.Node, e.Err) }

// Unwrap gives the reason.
func (e *NodeError) Unwrap() error { return e.Err }

// places looks at the host and the other nodes of its cluster, the likely ones
// first, until that is enough. errs are of those that could not be asked; the
// host's own comes first.
func (d *Driver) places(ctx context.Context, enough func(place) bool, likely func([]string) []string) (out []place, errs []error) {
	host, list, err := d.look(ctx)
	if err == nil {
		out = append(out, place{d, host, list})
		d.cluster.add(host, d)
		if enough(out[0]) {
			return out, nil
		}
	} else {
		errs = append(errs, err)
	}
	names, err := d.others(ctx, err == nil)
	if err != nil {
		errs = append(errs, err)
	}
	for _, name := range likely(names) {
		n, err := d.at(name)
		var p place
		if err == nil {
			p.d = n
			p.host, p.list, err = n.look(ctx)
		}
		if err != nil {
			errs = append(errs, &NodeError{name, err})
			continue
		}
		out = append(out, p)
		if enough(p) {
			break
		}
	}
	return out, errs
}

func (c *cluster) add(node string, d *Driver) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if key := strings.ToLower(node); c.drivers[key] == nil {
		c.drivers[key] = d
	}
}

// Nodes are the other nodes of the host's cluster that have answered, by the
// names that the cluster has for them.
func (d *Driver) Nodes() (out []string) {
	c := d.cluster
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, n := range c.drivers {
		if n != d && n.nodeName() != "" {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// oneError says all of them on one line.
func oneError(errs []error) (err error) {
	for i, e := range errs {
		if err = fmt.Errorf("%w; %w", err, e); i == 0 {
			err = e
		}
	}
	return err
}

// A sighting is a VM with the host that has it.
type sighting struct {
	place
	sys system
	// unseen is why some node could not be asked, which may have another VM of
	// the name; nil where all were, or a GUID was asked for.
	unseen error
}

// An UnseenError says that another VM may have the name, too: one on a node that
// could not be asked.
type UnseenError struct {
	Name, GUID string // of the VM that was found
	Err        error  // of the nodes
}

func (e *UnseenError) Error() string {
	return fmt.Sprintf("VM %q: another one of that name may be where nobody could look; name this one by its GUID, %s: %v", e.Name, e.GUID, e.Err)
}

// Unwrap gives why they could not be asked.
func (e *UnseenError) Unwrap() error { return e.Err }

// findSurely is find for what changes a VM: it is refused where another may be
// meant.
func (d *Driver) findSurely(ctx context.Context, name string) (sighting, error) {
	at, err := d.find(ctx, name)
	if err == nil && at.unseen != nil {
		return sighting{}, &UnseenError{name, at.sys.guid, at.unseen}
	}
	return at, err
}

// find finds a VM by its name or GUID, on the host or on another node of its
// cluster. A name is looked for on all nodes, as several VMs may have it; a
// GUID until it is found.
func (d *Driver) find(ctx context.Context, name string) (sighting, error) {
	guid, isGUID := guidOf(name)
	has := func(p place) bool {
		return isGUID && slices.ContainsFunc(p.list, func(s system) bool { return s.guid == guid }) || !isGUID && d.cluster.isAlone()
	}
	seen, errs := d.places(ctx, has, func(nodes []string) []string {
		if isGUID && len(nodes) > 1 {
			return d.ownerFirst(ctx, guid, nodes)
		}
		return nodes
	})
	if len(seen) == 0 {
		return sighting{}, oneError(errs)
	}
	var all []system
	for _, p := range seen {
		for _, s := range p.list {
			if !slices.ContainsFunc(all, func(o system) bool { return o.guid == s.guid }) { // one that moves may be seen twice
				all = append(all, s)
			}
		}
	}
	sys, err := choose(all, name)
	if err != nil {
		// It may be on a node that could not be asked.
		return sighting{}, oneError(append([]error{err}, errs...))
	}
	for _, p := range seen {
		for _, s := range p.list {
			if s.guid != sys.guid {
				continue
			}
			at := sighting{place: p, sys: s}
			if s.guid != guid || !isGUID {
				at.unseen = oneError(errs)
			}
			return at, nil
		}
	}
	panic("a VM that was seen nowhere")
}

// ownerFirst puts the node first that the cluster says owns a VM. It is only
// faster than asking all of them.
func (d *Driver) ownerFirst(ctx context.Context, guid string, nodes []string) []string {
	rows, err := d.members.query(ctx, "SELECT Name, OwnerNode FROM MSCluster_Resource WHERE Type = 'Virtual Machine' AND PrivateProperties.VmID = "+wsman.Quote(guid))
	if err != nil || len(rows) == 0 {
		return nodes
	}
	owner := rows[0].text("OwnerNode")
	slices.SortStableFunc(nodes, func(a, b string) int {
		switch {
		case strings.EqualFold(a, owner) == strings.EqualFold(b, owner):
			return 0
		case strings.EqualFold(a, owner):
			return -1
		}
		return 1
	})
	return nodes
}

// everywhere is the host and all other nodes of its cluster, each VM once.
func (d *Driver) everywhere(ctx context.Context) ([]place, []error) {
	seen, errs := d.places(ctx, func(place) bool { return d.cluster.isAlone() }, func(nodes []string) []string { return nodes })
	known := map[string]bool{}
	for i := range seen {
		seen[i].list = slices.DeleteFunc(seen[i].list, func(s system) bool {
			twice := known[s.guid]
			known[s.guid] = true
			return twice
		})
	}
	return seen, errs
}

// sameCluster says whether an entry was made on a node of the host's cluster.
// What it made is where the VM is.
func (d *Driver) sameCluster(ctx context.Context, e journal.Entry) bool {
	c := d.cluster
	if e.Data[dataNode] == "" || c.isAlone() {
		return false
	}
	d.nodes(ctx)
	return slices.ContainsFunc(c.known(), func(name string) bool { return strings.EqualFold(name, e.Data[dataNode]) })
}

// close ends the connections to all nodes but d.
func (c *cluster) close(d *Driver) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range c.drivers {
		if n != d {
			err = errors.Join(err, n.files.close(), n.client.Close())
		}
	}
	return err
}
