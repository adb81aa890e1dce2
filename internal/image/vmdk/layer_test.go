package vmdk_test

import (
	"bytes"
	"errors"
	"io"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// A layer that we write over a parent of ours is a chain to QEMU and to us:
// what was written shows, zeros hide the parent, the rest is the parent's.
func TestLayerOverParent(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.vmdk"), filepath.Join(dir, "top.vmdk")
	disk := imagetest.NewDisk(21, 40<<20+512)
	writeDisk(t, base, disk, image.CreateOptions{})
	want := make([]byte, disk.Size())
	if _, err := disk.ReadAt(want, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	img, err := openPath(base)
	if err != nil {
		t.Fatal(err)
	}
	info := img.Info()
	img.Close()
	w, err := vmdk.Create(top, image.CreateOptions{VirtualBytes: disk.Size(), Parent: "base.vmdk", ParentFormat: image.VMDK, ParentInfo: &info})
	if err != nil {
		t.Fatal(err)
	}
	changed := imagetest.NewDisk(22, 40<<20+512)
	for _, e := range []extent.Extent{{Off: 0, Len: 128 << 10}, {Off: 33 << 20, Len: 1 << 20}, {Off: 40 << 20, Len: 512}} {
		p := want[e.Off:e.End()]
		changed.ReadAt(p, e.Off)
		if _, err := w.WriteAt(p, e.Off); err != nil {
			t.Fatal(err)
		}
	}
	zeros := want[2<<20 : 5<<20]
	clear(zeros)
	if _, err := w.WriteAt(zeros, 2<<20); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	if img, err = openPath(top); err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	imagetest.Reader(t, img, bytes.NewReader(want))
	imagetest.Reader(t, img, imagetest.QemuRaw(t, top, "vmdk"))
	imagetest.Qemu(t, "check", "-f", "vmdk", top)
	kinds := map[image.Kind]int64{}
	for e, err := range img.Extents(t.Context(), extent.Extent{Len: img.Size()}) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Depth == 0 {
			kinds[e.Kind] += e.Len
		}
	}
	if kinds[image.Zero] < 3<<20 || kinds[image.Data] == 0 {
		t.Errorf("the layer holds %v, want 3 MiB of zeros and some data", kinds)
	}
}

func TestLayersThatCannotBe(t *testing.T) {
	good := &image.Info{Format: image.VMDK, Identity: "12345678", VirtualBytes: 1 << 20}
	for name, o := range map[string]image.CreateOptions{
		"of a stream":           {Variant: vmdk.StreamOptimized, ParentInfo: good},
		"of a flat disk":        {Variant: vmdk.MonolithicFlat, ParentInfo: good},
		"over a qcow2":          {ParentFormat: image.Qcow2, ParentInfo: good},
		"over a stranger":       {},
		"over one without CID":  {ParentInfo: &image.Info{VirtualBytes: 1 << 20}},
		"over one of no parent": {ParentInfo: &image.Info{VirtualBytes: 1 << 20, Identity: "ffffffff"}},
		"over a larger one":     {ParentInfo: &image.Info{VirtualBytes: 2 << 20, Identity: "12345678"}},
	} {
		o.VirtualBytes, o.Parent = 1<<20, "base.vmdk"
		path := filepath.Join(t.TempDir(), "top.vmdk")
		if _, err := vmdk.Create(path, o); err == nil {
			t.Errorf("a layer %s is made", name)
		}
		if left, _ := filepath.Glob(path); len(left) > 0 {
			t.Errorf("a layer %s leaves %v", name, left)
		}
	}
}

// A descriptor that names a parent must name its CID too; one that says that
// there is no parent is believed, with a warning.
func TestParentHintAlone(t *testing.T) {
	text := "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentFileNameHint=\"base.vmdk\"\nRW 8 ZERO\n"
	if _, err := openBytes([]byte(text), nil); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("no parentCID: %v", err)
	}
	img, err := openBytes([]byte(text+"parentCID=ffffffff\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if w := img.Info().Warnings; len(w) != 1 {
		t.Errorf("warnings %q", w)
	}
}
