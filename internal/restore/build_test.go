package restore

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/vhdx"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// A fakeBuilder has its files in a directory.
type fakeBuilder struct {
	dir     string
	free    int64
	damage  func(file string) // once a disk is written
	refuse  error             // Commit's
	what    []string          // Commit, Abort
	written []string
}

func (b *fakeBuilder) Room(_ context.Context, need map[vm.DiskID]int64) error {
	for _, n := range need {
		b.free -= n
	}
	if b.free < 0 {
		return fault.ErrNoSpace
	}
	return nil
}

func (b *fakeBuilder) file(id vm.DiskID) string { return filepath.Join(b.dir, string(id)+".vhdx") }

func (b *fakeBuilder) Create(_ context.Context, id vm.DiskID) (image.Output, string, error) {
	f, err := os.OpenFile(b.file(id), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	b.written = append(b.written, b.file(id))
	return f, `C:\VMs\` + string(id) + ".vhdx", err
}

func (b *fakeBuilder) Open(_ context.Context, id vm.DiskID) (image.Image, error) {
	if b.damage != nil {
		b.damage(b.file(id))
	}
	f, err := image.OpenFile(b.file(id))
	if err != nil {
		return nil, err
	}
	return vhdx.Open(f, nil)
}

func (b *fakeBuilder) Commit(context.Context) (hypervisor.Built, error) {
	b.what = append(b.what, "commit")
	return hypervisor.Built{Name: "web02"}, b.refuse
}

func (b *fakeBuilder) Abort(context.Context) error {
	b.what = append(b.what, "abort")
	return nil
}

// Disks arrive on another machine whole and proven, or its VM never sees them.
func TestBuild(t *testing.T) {
	const size = 5*step + 512
	for _, c := range []struct {
		name string
		b    fakeBuilder
		src  func(*fakeDisk)
		o    BuildOptions
		err  error
		what string
	}{
		{name: "whole", what: "commit"},
		{name: "fixed, proven", o: BuildOptions{Options: Options{Variant: "fixed"}, Prove: true}, what: "commit"},
		{name: "sectors of 4 KiB", o: BuildOptions{Options: Options{Sectors: map[vm.DiskID]int{"vda": 4096}}, Prove: true}, what: "commit"},
		{name: "one of two", o: BuildOptions{Disks: []vm.DiskID{"vdb"}}, what: "commit"},
		{name: "no room", b: fakeBuilder{free: 1 << 20}, err: fault.ErrNoSpace, what: "abort"},
		{name: "a chunk can't be read", src: func(d *fakeDisk) { d.corrupt = 1 }, err: fault.ErrCorrupt, what: "abort"},
		{name: "a chunk is lost", src: func(d *fakeDisk) { d.lose = true }, err: errAny, what: "abort"},
		{name: "the host stored something else", b: fakeBuilder{damage: flip}, o: BuildOptions{Prove: true}, err: fault.ErrCorrupt, what: "abort"},
		{name: "the host makes no VM", b: fakeBuilder{refuse: fault.ErrExists}, err: fault.ErrExists, what: "commit abort"},
		{name: "no such disk", o: BuildOptions{Disks: []vm.DiskID{"vdz"}}, err: fault.ErrNotFound, what: "abort"},
		{name: "another format", o: BuildOptions{Options: Options{Format: image.Qcow2}}, err: fault.ErrUnsupported, what: "abort"},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			r := &fakeRepo{disks: map[point.ManifestID]*fakeDisk{"a": newDisk(size, 0, 1, 5), "b": newDisk(size, 2)}}
			if c.src != nil {
				c.src(r.disks["a"])
			}
			p := &point.RestorePoint{ID: "20261122T031500Z-7f3a9c01", VM: "web01", Disks: []point.Disk{
				{Disk: vm.Disk{ID: "vda"}, Manifest: "a"}, {Disk: vm.Disk{ID: "vdb"}, Manifest: "b"}}}
			b := c.b
			b.dir = t.TempDir()
			if b.free == 0 {
				b.free = 1 << 40
			}
			res, err := Build(t.Context(), r, p, &b, c.o)
			if c.err == nil && err != nil || c.err == errAny && err == nil || c.err != errAny && !errors.Is(err, c.err) {
				t.Errorf("%v, want %v", err, c.err)
			}
			if got := strings.Join(b.what, " "); got != c.what {
				t.Errorf("it was told to %q, want %q", got, c.what)
			}
			if err != nil {
				return
			}
			if want := max(len(c.o.Disks), 2-len(c.o.Disks)); len(res.Disks) != want || res.VM == nil {
				t.Fatalf("%+v", res)
			}
			for _, d := range res.Disks {
				f, err := image.OpenFile(b.file(d.Disk))
				if err != nil {
					t.Fatal(err)
				}
				img, err := vhdx.Open(f, nil)
				if err != nil {
					t.Fatal(err)
				}
				want := r.disks[map[vm.DiskID]point.ManifestID{"vda": "a", "vdb": "b"}[d.Disk]].content
				got := make([]byte, len(want))
				if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
					t.Errorf("disk %s is another (%v)", d.Disk, err)
				}
				if n := img.Info().SectorBytes; n != max(c.o.Sectors[d.Disk], 512) {
					t.Errorf("disk %s has sectors of %d bytes", d.Disk, n)
				}
				img.Close()
			}
		})
	}
}

// errAny stands for an error of no class.
var errAny = errors.New("any")

// flip changes a byte of what a VHDX holds, behind its metadata.
func flip(file string) {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		panic(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	f.ReadAt(b, 4<<20)
	b[0] ^= 1
	f.WriteAt(b, 4<<20)
}
