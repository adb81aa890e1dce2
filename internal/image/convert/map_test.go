package convert_test

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/convert"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/open"
)

func wholeOf(img image.Image) extent.Extent { return extent.Extent{Len: img.Size()} }

// A qemuExtent is a line of qemu-img map --output=json.
type qemuExtent struct {
	Start, Length int64
	Depth         int
	Present       bool
	Zero, Data    bool
	Offset        *int64
}

// mapAgrees compares what we say of every byte with what qemu-img map says.
func mapAgrees(t *testing.T, path, qemu string, img image.Image) {
	t.Helper()
	var list []qemuExtent
	if err := json.Unmarshal([]byte(imagetest.Qemu(t, "map", "--output=json", "-f", qemu, path)), &list); err != nil {
		t.Fatal(err)
	}
	depth := 0
	for e, err := range convert.Map(t.Context(), img, wholeOf(img)) {
		if err != nil {
			t.Fatal(err)
		}
		depth = max(depth, e.Depth)
		for off := e.Off; off < e.End(); {
			for len(list) > 0 && list[0].Start+list[0].Length <= off {
				list = list[1:]
			}
			if len(list) == 0 {
				return // sizes may be rounded differently
			}
			q := list[0]
			end := min(e.End(), q.Start+q.Length)
			switch {
			case q.Zero == (e.Kind == image.Data):
				t.Errorf("%d bytes at %d: we say %v, qemu-img %+v", end-off, off, e.Kind, q)
			case e.Kind == image.Data && e.Depth != q.Depth:
				t.Errorf("%d bytes at %d: depth %d, qemu-img %+v", end-off, off, e.Depth, q)
			case e.Kind == image.Data && e.FileOffset >= 0 && q.Offset != nil && e.FileOffset+off-e.Off != *q.Offset+off-q.Start:
				t.Errorf("%d bytes at %d: at %d of the file, qemu-img %+v", end-off, off, e.FileOffset+off-e.Off, q)
			case e.Compressed && q.Offset != nil:
				t.Errorf("%d bytes at %d: compressed, qemu-img %+v at %d", end-off, off, q, *q.Offset)
			default:
				off = end
				continue
			}
			return
		}
	}
}

// qemu-img knows no holes of VHDX, reads differencing VHD wrongly, and takes
// what a raw file's file system says, as we do.
func TestMapAgreesWithQemuOnSamples(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{
		"dissect/backing-chain-3.qcow2.gz", "dissect/backing-chain-2.qcow2.gz", "dissect/backing-chain-1.qcow2.gz",
		"dfvfs/ext2.qcow2.gz", "dfvfs-old/image.qcow2.gz", "dissect/basic-zstd.qcow2.gz", "dissect/basic.qcow2.gz", "keramics/ext2.qcow2.gz",
		"virtnbdbackup/vm5-sda.qcow2.gz", "cdi/invalid-qcow-large-json.img.gz",
		"dfvfs/ext2.vhd.gz", "qemu-iotests/d2v-zerofilled.vhd.bz2", "qemu-iotests/hyperv2012r2-dynamic.vhd.bz2",
		"dfvfs-old/image.vmdk.gz", "vmdk-rs/monolithicSparse.vmdk.gz", "vmdk-rs/streamOptimized.vmdk.gz", "cot/blank-old.vmdk.gz",
		"qemu-iotests/iotest-version3.vmdk.bz2", "vmdk-rs/twoGbMaxExtentSparse-s001.vmdk.gz", "vmdk-rs/twoGbMaxExtentSparse.vmdk",
	} {
		t.Run(name, func(t *testing.T) {
			path, _ := imagetest.SampleIn(t, dir, name)
			if strings.Contains(name, "-s001") {
				return // opened through its descriptor
			}
			format, qemu := image.Qcow2, "qcow2"
			switch {
			case strings.Contains(name, ".vhd"):
				format, qemu = image.VHD, "vpc"
			case strings.Contains(name, ".vmdk"):
				format, qemu = image.VMDK, "vmdk"
			}
			img, err := open.Open(path, open.Options{Format: format, ParentDir: dir})
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			mapAgrees(t, path, qemu, img)
		})
	}
}

func TestMapAgreesWithQemuOnNewImages(t *testing.T) {
	raw := imagetest.NewDisk(12, 20<<20).Save(t)
	for _, c := range []struct {
		format     image.Format
		qemu, opts string
	}{
		{image.Raw, "raw", ""},
		{image.Qcow2, "qcow2", "compat=0.10"},
		{image.Qcow2, "qcow2", "cluster_size=512"},
		{image.Qcow2, "qcow2", "extended_l2=on,cluster_size=128k"},
		{image.VHD, "vpc", "force_size=on"},
		{image.VHD, "vpc", "force_size=on,subformat=fixed"},
		{image.VMDK, "vmdk", ""},
		{image.VMDK, "vmdk", "zeroed_grain=on"},
		{image.VMDK, "vmdk", "subformat=monolithicFlat"},
		{image.VMDK, "vmdk", "subformat=streamOptimized"},
	} {
		t.Run(c.qemu+" "+c.opts, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk")
			args := []string{"convert", "-f", "raw", "-O", c.qemu}
			if c.opts != "" {
				args = append(args, "-o", c.opts)
			}
			imagetest.Qemu(t, append(args, raw, path)...)
			img, err := open.Open(path, open.Options{Format: c.format})
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			mapAgrees(t, path, c.qemu, img)
		})
	}
}
