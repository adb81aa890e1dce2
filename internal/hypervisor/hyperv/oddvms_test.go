package hyperv

import (
	"bytes"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/vhd"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/secret"
	"github.com/backstay/backstay/internal/smb"
	"github.com/backstay/backstay/internal/smb/smbtest"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// A VM whose disks lie on another server's share is read there, once the source
// says which server and share that is; until then the disk is named.
func TestDisksOnAnotherServer(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	dir := imagetest.MemoryDir(t)
	s := newSiteIn(t, dir)
	s.name = "far01"
	if _, err := s.host.AddVM(host.Spec{Name: s.name, Disks: []host.DiskSpec{{Path: `\\fs01\vms\far01\far01.vhdx`, Bytes: int64(len(s.disk))}}}); err != nil {
		t.Fatal(err)
	}
	s.write(0, "on another server")
	samba := smbtest.Run(t, smbtest.Options{Dir: filepath.Join(dir, "UNC", "fs01", "vms")})
	reach := func(words ...string) *shareFiles {
		shares := smb.NewShares("hv01")
		for _, w := range words {
			if err := shares.Add(w); err != nil {
				t.Fatal(err)
			}
		}
		f, err := newShareFiles(address{smb: samba.Addr(), user: smbtest.User, shares: shares}, secret.New([]byte(smbtest.Password)))
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	s.files = reach()
	if res := s.backUp(nil); res.Err == nil || !strings.Contains(res.Err.Error(), `\\fs01\vms`) {
		t.Errorf("without a share: %v", res.Err)
	}
	s.wantTidy(0)
	s.files = reach(`\\fs01\vms=` + smbtest.Share)
	s.mustBackUp()
	s.write(1<<20, "the second")
	s.files = reach(`\\fs01\vms=` + smbtest.Share)
	if d := s.mustBackUp().Point.Disks[0]; d.Mode != "incremental" {
		t.Errorf("%s, %s", d.Mode, d.Reason)
	}
	s.wantPoints()
	s.wantTidy(1)
}

// The files of the checkpoint's definition are in the restore point, with the
// state of the VM's TPM.
func TestDefinitionFiles(t *testing.T) {
	s := newSite(t)
	p := s.mustBackUp().Point
	var ends []string
	for name := range maps.Keys(p.Config) {
		ends = append(ends, filepath.Ext(name))
	}
	slices.Sort(ends)
	if !slices.Equal(ends, []string{".json", ".vmcx", ".vmgs", ".vmrs"}) {
		t.Errorf("%q", slices.Collect(maps.Keys(p.Config)))
	}
}

// A disk of 4 KiB sectors, and the file that the guest writes to over it.
func TestLargeSectors(t *testing.T) {
	h := newFakeHost(t)
	path := filepath.Join(h.dir, "web01.vhdx")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	w, err := vhdx.Create(path, image.CreateOptions{VirtualBytes: diskSize, BlockBytes: 1 << 20, SectorBytes: 4096})
	if err == nil {
		err = w.Finish()
	}
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	f, err := image.OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	img, err := vhdx.Open(f, nil)
	if err != nil {
		t.Fatal(err)
	}
	h.base = img.Info()
	img.Close()
	h.write(4096*5, bytes.Repeat([]byte("four KiB"), 512))
	d := h.driver(imagetest.MemoryDir(t), Options{})
	prev := mustCommit(t, mustBegin(t, d, hypervisor.Options{}))
	h.write(4096*700, bytes.Repeat([]byte("four KiB"), 512))
	s := mustBegin(t, d, hypervisor.Options{Previous: prev})
	defer mustAbort(t, s)
	if mode, reason := s.Disks()[0].Mode(); mode != "incremental" {
		t.Errorf("%s, %s", mode, reason)
	}
	got := make([]byte, diskSize)
	if _, err := s.Disks()[0].ReadAt(got, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if !bytes.Equal(got, h.disk) {
		t.Error("what is read is not what the guest wrote")
	}
}

// A VHD that lies on another is read through it, and names both.
func TestChainOfVHD(t *testing.T) {
	h := newFakeHost(t)
	base := filepath.Join(h.dir, "base.vhd")
	w, err := vhd.Create(base, image.CreateOptions{VirtualBytes: diskSize})
	if err == nil {
		_, err = w.WriteAt([]byte(strings.Repeat("base", 128)), 0)
	}
	if err == nil {
		err = w.Finish()
	}
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	f, err := image.OpenFile(base)
	if err != nil {
		t.Fatal(err)
	}
	img, err := vhd.Open(f, nil)
	if err != nil {
		t.Fatal(err)
	}
	info := img.Info()
	img.Close()
	w, err = vhd.Create(filepath.Join(h.dir, "top.avhd"), image.CreateOptions{VirtualBytes: diskSize, Parent: `.\base.vhd`, ParentFormat: image.VHD, ParentInfo: &info})
	if err == nil {
		_, err = w.WriteAt([]byte(strings.Repeat("top!", 128)), 1<<20)
	}
	if err == nil {
		err = w.Finish()
	}
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	top, chain, err := openChain(t.Context(), fakeFiles{h}, folderVM+"top.avhd", "vhd", map[string]bool{"C$": true})
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	if !slices.Equal(chain, []string{folderVM + "top.avhd", folderVM + "base.vhd"}) {
		t.Errorf("%q", chain)
	}
	for off, want := range map[int64]string{0: "base", 1 << 20: "top!"} {
		got := make([]byte, 4)
		if _, err := top.ReadAt(got, off); err != nil || string(got) != want {
			t.Errorf("at %d: %q, %v", off, got, err)
		}
	}
}
