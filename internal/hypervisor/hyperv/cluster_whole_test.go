package hyperv_test

import (
	"bytes"
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/hyperv"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb/smbtest"
	sim "github.com/backstay/backstay/sim/hyperv"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// Two nodes whose shared volume a real Samba serves, one source: the VM is on
// the node that the source does not name, and moves while it is read.
func TestClusterOfTheWholePath(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	const name = "web-of-cluster"
	dir := imagetest.MemoryDir(t)
	csv := filepath.Join(dir, "csv")
	var nodes []*host.Host
	for _, node := range []string{"HV01", "HV02"} {
		h, err := host.New(host.Options{Dir: filepath.Join(dir, node), Shared: csv, Name: node, JobTime: time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Close() })
		nodes = append(nodes, h)
	}
	c := host.NewCluster("HVC", nodes...)
	if _, err := nodes[1].AddVM(host.Spec{Name: name, Root: `C:\ClusterStorage\Volume1\` + name, Disks: []host.DiskSpec{{Bytes: 4 << 20}}}); err != nil {
		t.Fatal(err)
	}
	samba := smbtest.Run(t, smbtest.Options{Dir: csv})
	var at [2]*url.URL
	query := url.Values{"smb": {samba.Addr(), "HV02=" + samba.Addr()}, "share": {`C:\ClusterStorage=` + smbtest.Share}}
	for i, h := range nodes {
		e, err := sim.Serve(h, "", sim.Options{User: smbtest.User, Password: smbtest.Password})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { e.Close() })
		if at[i], err = url.Parse(e.URL); err != nil {
			t.Fatal(err)
		}
		query.Add("fingerprint", "sha256:"+e.Fingerprint)
	}
	query.Add("node", "HV02="+at[1].Host)
	u, _, err := hyperv.ParseSource(fmt.Sprintf("hyperv://%s@%s?%s", smbtest.User, at[0].Host, query.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	d, err := hyperv.Open(t.Context(), hyperv.Options{Host: u, Password: secret.New([]byte(smbtest.Password)), StateDir: imagetest.MemoryDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	want := make([]byte, 4<<20)
	copy(want[70_000:], "written before")
	if err := c.Owner(name).WriteBytes(name, 0, 70_000, []byte("written before")); err != nil {
		t.Fatal(err)
	}
	s, err := d.Begin(t.Context(), name, hypervisor.Options{RepoID: "00112233445566778899aabbccddeeff"})
	if err != nil {
		t.Fatal(err)
	}
	if m := s.Machine(); m.Host != "HV02" {
		t.Errorf("it is on %s", m.Host)
	}
	if err := c.Move(name, "HV01"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := s.Disks()[0].ReadAt(got, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("what is read is not what the guest wrote")
	}
	if err := s.(hypervisor.Checker).Check(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.Commit(t.Context()); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(csv, "Volume1", name, "*", "*.avhdx")); err != nil || len(left) > 0 {
		t.Errorf("left on the volume: %v, %v", left, err)
	}
}
