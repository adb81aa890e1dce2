package hyperv_test

import (
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/wsman"
	"github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

const guidOfMoved = "0A7D4F1C-6B1E-4C55-9B1A-0C51AD6F0007"

// serveCluster gives two nodes, and our client of each.
func serveCluster(t *testing.T) (*host.Cluster, [2]*host.Host, [2]*wsman.Client) {
	t.Helper()
	dir := t.TempDir()
	var nodes [2]*host.Host
	for i, name := range []string{"HV01", "HV02"} {
		h, err := host.New(host.Options{Dir: filepath.Join(dir, name), Shared: filepath.Join(dir, "csv"), Name: name, JobTime: 30 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Close() })
		nodes[i] = h
	}
	c := host.NewCluster("HVC", nodes[0], nodes[1])
	if _, err := nodes[0].AddVM(host.Spec{Name: "web01", ID: guidOfMoved, Root: `C:\ClusterStorage\Volume1\web01`, Disks: []host.DiskSpec{{Bytes: 8 << 20}}}); err != nil {
		t.Fatal(err)
	}
	var clients [2]*wsman.Client
	for i, h := range nodes {
		e, err := hyperv.Serve(h, "", hyperv.Options{User: "Administrator", Password: "Pässw0rd", HTTP: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { e.Close() })
		if clients[i], err = wsman.New(wsman.Config{URL: e.URL, User: "Administrator", Password: secret.New([]byte("Pässw0rd")), Timeout: time.Minute}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { clients[i].Close() })
	}
	return c, nodes, clients
}

// owner asks a node who has the VM.
func owner(t *testing.T, c *wsman.Client) string {
	t.Helper()
	in, err := c.In("root/MSCluster")
	if err != nil {
		t.Fatal(err)
	}
	rows, err := wsman.All(in.Query(t.Context(), "SELECT OwnerNode, Name FROM MSCluster_Resource WHERE Type = 'Virtual Machine' AND PrivateProperties.VmID = "+wsman.Quote(guidOfMoved)))
	if err != nil || len(rows) != 1 {
		t.Fatal(rows, err)
	}
	node, err := wsman.Prop[string](rows[0], "OwnerNode")
	if err != nil {
		t.Fatal(err)
	}
	return node
}

// A VM that moves takes its checkpoint along, and every node says where it is.
func TestLiveMigration(t *testing.T) {
	c, nodes, clients := serveCluster(t)
	vm := wsman.NewRef("Msvm_ComputerSystem", "CreationClassName", "Msvm_ComputerSystem", "Name", guidOfMoved)
	if node := owner(t, clients[1]); node != "HV01" {
		t.Errorf("before it moved: %s", node)
	}
	made := job(t, clients[0], "CreateSnapshot", wsman.Arg("AffectedSystem", wsman.Of(vm)), wsman.Arg("SnapshotType", wsman.Of(uint16(32768))))
	if err := c.Move("web01", "HV02"); err != nil {
		t.Fatal(err)
	}
	for i, client := range clients {
		if node := owner(t, client); node != "HV02" {
			t.Errorf("node %d says that %s has it", i, node)
		}
	}
	if _, err := clients[0].Get(t.Context(), vm); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("the old node: %v", err)
	}
	if _, err := clients[1].Invoke(t.Context(), service, "DestroySnapshot", wsman.Arg("AffectedSnapshot", wsman.Of(made))); err != nil {
		t.Fatal(err)
	}
	if err := c.Move("web01", "HV01"); err == nil {
		t.Error("it moves while a job runs")
	}
	if c.Owner("web01") != nodes[1] {
		t.Error("it is not on its owner")
	}
	in, err := clients[0].In("root/MSCluster")
	if err != nil {
		t.Fatal(err)
	}
	rows, err := wsman.All(in.Query(t.Context(), "SELECT * FROM MSCluster_Resource WHERE Type='Virtual Machine'"))
	if err != nil || len(rows) != 1 {
		t.Fatal(rows, err)
	}
	private, err := wsman.Prop[*wsman.Instance](rows[0], "PrivateProperties")
	if err != nil {
		t.Fatal(err)
	}
	if id, err := wsman.Prop[string](private, "VmID"); err != nil || id != "0a7d4f1c-6b1e-4c55-9b1a-0c51ad6f0007" {
		t.Errorf("VmID %q, %v", id, err)
	}
	c.Deny(true)
	if _, err := wsman.All(in.Enumerate(t.Context(), "MSCluster_Node")); !errors.Is(err, fault.ErrDenied) {
		t.Errorf("whom the cluster does not know: %v", err)
	}
}

func TestAHostOfNoCluster(t *testing.T) {
	_, c := serve(t, hyperv.Options{HTTP: true}, nil)
	in, err := c.In("root/MSCluster")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := wsman.All(in.Query(t.Context(), "SELECT * FROM MSCluster_Node")); !errors.Is(err, wsman.ErrNoClass) {
		t.Errorf("%v", err)
	}
}
