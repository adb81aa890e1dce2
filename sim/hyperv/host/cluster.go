package host

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/backstay/backstay/sim/hyperv/cim"
	"github.com/backstay/backstay/sim/hyperv/wsman"
)

// States of a node.
const (
	nodeUp   = 0
	nodeDown = 1
)

// groupOfVM is the GroupType of a group that is a virtual machine.
const groupOfVM = 111

// A Cluster is hosts that share volumes and pass VMs on to each other. All VMs
// of its hosts are its resources. It is safe for concurrent use.
type Cluster struct {
	name string

	mu    sync.Mutex // taken before those of its hosts, which are taken in the nodes' order
	nodes []*Host
	down  map[*Host]bool
	deny  bool
}

// NewCluster makes a cluster of hosts that do not answer yet. Their Shared is
// one directory.
func NewCluster(name string, nodes ...*Host) *Cluster {
	c := &Cluster{name: name, nodes: nodes, down: map[*Host]bool{}}
	for _, h := range nodes {
		h.cluster = c
	}
	return c
}

// Deny makes the cluster's namespace one that the user may not read, or not so
// any more.
func (c *Cluster) Deny(deny bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deny = deny
}

// Move is a live migration: the VM runs on another node from then on, with its
// checkpoints, reference points and what is tracked. It fails while a job of
// the VM runs.
func (c *Cluster) Move(name, node string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.lockAll()()
	from := c.owner(name)
	to := c.named(node)
	switch {
	case from == nil:
		return fmt.Errorf("no VM %s on any node", name)
	case to == nil || c.down[to]:
		return fmt.Errorf("node %s is not there", node)
	case from == to:
		return nil
	}
	v := from.byName(name)
	if v.busy != nil {
		return fmt.Errorf("VM %s: a job of it is running", name)
	}
	for _, d := range v.list {
		if !strings.HasPrefix(strings.ToLower(d.top().path), `c:\clusterstorage\`) {
			return fmt.Errorf("VM %s: %s is not on a shared volume", name, d.top().path)
		}
	}
	pass(v, from, to)
	return nil
}

// Owner is the host that has a VM, nil for none.
func (c *Cluster) Owner(name string) *Host {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.lockAll()()
	return c.owner(name)
}

// Fail makes a node go down. Its VMs start anew on the next one that is up;
// what their jobs were about is undecided for ever. Whoever serves the host
// ends that.
func (c *Cluster) Fail(node string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.lockAll()()
	from := c.named(node)
	if from == nil {
		return fmt.Errorf("no node %s", node)
	}
	c.down[from] = true
	for _, to := range c.nodes {
		if c.down[to] {
			continue
		}
		for _, v := range append([]*vm(nil), from.vms...) {
			if v.busy != nil {
				return fmt.Errorf("VM %s: a job of it is running", v.name) // its work would go on
			}
			if v.planned {
				continue // it is the node's own
			}
			pass(v, from, to)
			v.changed = to.stamp()
		}
		return nil
	}
	return errors.New("no node is left")
}

func pass(v *vm, from, to *Host) {
	for i := range from.vms {
		if from.vms[i] == v {
			from.vms = append(from.vms[:i:i], from.vms[i+1:]...)
			break
		}
	}
	to.findSwitches(v.config)
	to.vms = append(to.vms, v)
}

func (c *Cluster) lockAll() (unlock func()) {
	for _, h := range c.nodes {
		h.mu.Lock()
	}
	return func() {
		for _, h := range c.nodes {
			h.mu.Unlock()
		}
	}
}

func (c *Cluster) owner(name string) *Host {
	for _, h := range c.nodes {
		if h.byName(name) != nil {
			return h
		}
	}
	return nil
}

func (c *Cluster) named(node string) *Host {
	for _, h := range c.nodes {
		if strings.EqualFold(h.o.Name, node) {
			return h
		}
	}
	return nil
}

// instances are those of the cluster's own namespace, the same from each node.
func (c *Cluster) instances(put func(*cim.Instance)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.lockAll()()
	put(cim.New(cim.MSCluster, "MSCluster_Cluster").Put("Name", cim.Text(c.name)).Put("Caption", cim.Text(c.name)).
		Put("SharedVolumesRoot", cim.Text(`C:\ClusterStorage`)).Put("EnableSharedVolumes", cim.Text("1")))
	for n, h := range c.nodes {
		state := nodeUp
		if c.down[h] {
			state = nodeDown
		}
		put(cim.New(cim.MSCluster, "MSCluster_Node").Put("Name", cim.Text(h.o.Name)).Put("Caption", cim.Text(h.o.Name)).Put("Id", cim.Number(n+1)).
			Put("State", cim.Number(state)).Put("MajorVersion", cim.Text("10")).Put("BuildNumber", cim.Text("20348")))
		for _, v := range h.vms {
			c.resources(h, v, put)
		}
	}
}

func (c *Cluster) resources(h *Host, v *vm, put func(*cim.Instance)) {
	if v.planned {
		return
	}
	online := "0" // of a group
	if v.state != stateRunning {
		online = "1"
	}
	put(cim.New(cim.MSCluster, "MSCluster_ResourceGroup").Put("Name", cim.Text(v.name)).Put("Id", cim.Text(strings.ToLower(v.id))).
		Put("GroupType", cim.Number(groupOfVM)).Put("State", cim.Text(online)).Put("OwnerNode", cim.Text(h.o.Name)).Put("IsCore", cim.Bool(false)))
	online = "2" // of a resource
	if v.state != stateRunning {
		online = "3"
	}
	private := cim.Holding(cim.New(cim.MSCluster, "MSCluster_Property").Put("VmID", cim.Text(strings.ToLower(v.id))))
	for kind, prefix := range map[string]string{"Virtual Machine": "Virtual Machine ", "Virtual Machine Configuration": "Virtual Machine Configuration "} {
		state := online
		if kind != "Virtual Machine" {
			state = "2"
		}
		put(cim.New(cim.MSCluster, "MSCluster_Resource").Put("Name", cim.Text(prefix+v.name)).Put("Type", cim.Text(kind)).
			Put("State", cim.Text(state)).Put("OwnerGroup", cim.Text(v.name)).Put("OwnerNode", cim.Text(h.o.Name)).
			Put("PrivateProperties", private).Put("CoreResource", cim.Bool(false)))
	}
}

// Admit says whether the host has a namespace and shows it.
func (h *Host) Admit(namespace string) *wsman.Fault {
	switch {
	case strings.EqualFold(namespace, cim.Virtualization), strings.EqualFold(namespace, cim.CIMV2):
		return nil
	case h.cluster == nil || !strings.EqualFold(namespace, cim.MSCluster):
		return wsman.NoNamespace(namespace)
	}
	h.cluster.mu.Lock()
	defer h.cluster.mu.Unlock()
	if h.cluster.deny {
		return wsman.Denied("the cluster's namespace is for its administrators")
	}
	return nil
}
