package vmdk_test

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// openPath opens a VMDK with the extents that lie beside it.
func openPath(path string) (image.Image, error) {
	f, err := image.OpenFile(path)
	if err != nil {
		return nil, err
	}
	dir := open.DirResolver{Dir: filepath.Dir(path), Plain: true}
	parents := open.DirResolver{Dir: filepath.Dir(path), ByBase: true}
	opener := func(f image.File, _ image.Format, parent image.OpenParent) (image.Image, error) {
		d, err := vmdk.Open(f, image.OpenOptions{Resolver: dir, Parent: parent})
		if err != nil {
			return nil, err
		}
		return d, nil
	}
	img, err := opener(f, image.VMDK, image.Parents(f, parents, opener))
	if err != nil {
		f.Close()
		return nil, err
	}
	return img, nil
}

func TestSamplesReadToTheirHash(t *testing.T) {
	for _, c := range []struct{ name, with string }{
		{"cot/blank-old.vmdk.gz", ""},
		{"dfvfs-old/image.vmdk.gz", ""},
		{"dissect/sesparse-descriptor.OURS.vmdk", "dissect/sesparse.vmdk.gz"},
		{"qemu-iotests/iotest-version3.vmdk.bz2", ""},
		{"vmdk-rs/monolithicFlat.vmdk", "vmdk-rs/monolithicFlat-flat.vmdk.gz"},
		{"vmdk-rs/monolithicSparse.vmdk.gz", ""},
		{"vmdk-rs/streamOptimized.vmdk.gz", ""},
		{"vmdk-rs/twoGbMaxExtentSparse.vmdk", "vmdk-rs/twoGbMaxExtentSparse-s001.vmdk.gz"},
		{"vmdk-rs/vmfs_thick.vmdk", "vmdk-rs/vmfs_thick-flat.vmdk.gz"},
	} {
		t.Run(c.name, func(t *testing.T) {
			imagetest.Samples(t)
			dir := t.TempDir()
			want := ""
			if c.with != "" {
				_, want = imagetest.SampleIn(t, dir, c.with)
			}
			path := filepath.Join(dir, filepath.Base(c.name))
			if c.name != "dissect/sesparse-descriptor.OURS.vmdk" { // it has no hash of its own
				path, want = imagetest.SampleIn(t, dir, c.name)
			} else {
				copyFile(t, filepath.Join(imagetest.Samples(t), c.name), path)
			}
			img, err := openPath(path)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			imagetest.Holds(t, img, img.Size(), want)
		})
	}
}

func TestVariantsByQemu(t *testing.T) {
	disk := imagetest.NewDisk(6, 9<<20+1536)
	src := disk.Save(t)
	for _, o := range []string{
		"subformat=monolithicSparse", "subformat=monolithicSparse,compat6", "subformat=monolithicSparse,zeroed_grain=on",
		"subformat=monolithicFlat", "subformat=twoGbMaxExtentSparse", "subformat=twoGbMaxExtentFlat", "subformat=streamOptimized",
	} {
		t.Run(o, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.vmdk")
			imagetest.Qemu(t, "convert", "-f", "raw", "-O", "vmdk", "-o", o, src, path)
			img, err := openPath(path)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			imagetest.Reader(t, img, disk)
			if img.Size() != disk.Size() {
				t.Errorf("%d bytes, want %d", img.Size(), disk.Size())
			}
		})
	}
	// More than one extent.
	path := filepath.Join(t.TempDir(), "large.vmdk")
	for _, o := range []string{"subformat=twoGbMaxExtentSparse", "subformat=twoGbMaxExtentFlat"} {
		imagetest.Qemu(t, "create", "-f", "vmdk", "-o", o, path, "5G")
		qemuIO(t, path, "write -P 7 2146435072 3M", "write -P 9 4294966784 1k", "write -P 3 5368708608 512")
		img, err := openPath(path)
		if err != nil {
			t.Fatal(err)
		}
		imagetest.Reader(t, img, imagetest.QemuRaw(t, path, "vmdk"))
		img.Close()
	}
}

func qemuIO(t *testing.T, path string, commands ...string) {
	t.Helper()
	args := []string{"-f", "vmdk"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out, err := exec.Command(imagetest.Tool(t, "qemu-io"), append(args, path)...).CombinedOutput(); err != nil || bytes.Contains(out, []byte("failed")) {
		t.Fatalf("qemu-io %v: %v\n%s", commands, err, out)
	}
}

func TestSnapshotChain(t *testing.T) {
	dir := t.TempDir()
	path := func(i int) string { return filepath.Join(dir, fmt.Sprintf("disk%d.vmdk", i)) }
	imagetest.Qemu(t, "create", "-f", "vmdk", path(0), "16M")
	qemuIO(t, path(0), "write -P 1 0 8M", "write -P 2 15M 1M")
	imagetest.Qemu(t, "create", "-f", "vmdk", "-b", path(0), "-F", "vmdk", path(1))
	qemuIO(t, path(1), "write -P 3 1M 1M", "write -P 4 9000k 100k")
	imagetest.Qemu(t, "create", "-f", "vmdk", "-o", "subformat=monolithicSparse,zeroed_grain=on", "-b", path(1), "-F", "vmdk", path(2))
	qemuIO(t, path(2), "write -z 1536k 64k", "write -P 5 1600k 10k", "write -P 6 12M 1")
	img, err := openPath(path(2))
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	imagetest.Reader(t, img, imagetest.QemuRaw(t, path(2), "vmdk"))
	depths, kinds := map[int]bool{}, map[image.Kind]bool{}
	for e, err := range img.Extents(t.Context(), extent.Extent{Len: img.Size()}) {
		if err != nil {
			t.Fatal(err)
		}
		depths[e.Depth], kinds[e.Kind] = true, true
	}
	if len(depths) != 3 || len(kinds) != 3 {
		t.Errorf("depths %v and kinds %v, want three of each", depths, kinds)
	}
	// Whoever writes to a parent breaks the chain, and that must be told.
	qemuIO(t, path(0), "write -P 9 5M 1k")
	if _, err := openPath(path(2)); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("after a write to the base: %v", err)
	}
}

// ESX's COWD extents are nowhere to be had; this one follows the description.
func TestCOWD(t *testing.T) {
	const sectors = 8192
	disk := make([]byte, sectors*512)
	held := []int{0, 1, 2, 100, 101, 4095, 5000, sectors - 1}
	for _, s := range held {
		for i := range 512 {
			disk[s*512+i] = byte(s + i)
		}
	}
	text := "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"vmfsSparse\"\nRW 8192 VMFSSPARSE \"x-delta.vmdk\"\n"
	img, err := openBytes([]byte(text), &imagetest.Dir{Files: map[string][]byte{"x-delta.vmdk": cowd(disk, held)}})
	if err != nil {
		t.Fatal(err)
	}
	imagetest.Reader(t, img, bytes.NewReader(disk))
}
