package vmdk_test

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// writeDisk makes a VMDK of disk at path.
func writeDisk(t testing.TB, path string, disk *imagetest.Disk, o image.CreateOptions) {
	t.Helper()
	o.VirtualBytes = disk.Size()
	w, err := vmdk.Create(path, o)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	p := make([]byte, 1<<20)
	for off := int64(0); off < disk.Size(); off += int64(len(p)) {
		n, err := disk.ReadAt(p, off)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if _, err := w.WriteAt(p[:n], off); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
}

// 7-Zip reads each variant by code that shares nothing with QEMU's.
func TestSevenZipReadsWhatWeWrite(t *testing.T) {
	sevenZip := imagetest.Tool(t, "7z")
	disk := imagetest.NewDisk(12, 40<<20)
	want := imagetest.Hash(t, disk, disk.Size())
	for _, variant := range vmdk.Variants {
		dir := t.TempDir()
		path := filepath.Join(dir, "disk.vmdk")
		writeDisk(t, path, disk, image.CreateOptions{Variant: variant})
		out := filepath.Join(dir, "out")
		if b, err := exec.Command(sevenZip, "x", "-y", "-tVMDK", "-o"+out, path).CombinedOutput(); err != nil {
			t.Errorf("%s: 7z: %v\n%s", variant, err, b)
			continue
		}
		files, err := filepath.Glob(filepath.Join(out, "*"))
		if err != nil || len(files) != 1 {
			t.Errorf("%s: 7z unpacked %v, %v", variant, files, err)
			continue
		}
		f, err := os.Open(files[0])
		if err != nil {
			t.Fatal(err)
		}
		info, _ := f.Stat()
		if got := imagetest.Hash(t, f, info.Size()); got != want {
			t.Errorf("%s: 7-Zip reads %d bytes with hash %s, want %d with %s", variant, info.Size(), got, disk.Size(), want)
		}
		f.Close()
	}
}

// libvmdk looks more closely than others at descriptors and extents' names.
func TestLibvmdkTakesOurDescriptors(t *testing.T) {
	vmdkinfo := imagetest.Tool(t, "vmdkinfo")
	disk := imagetest.NewDisk(12, 40<<20)
	for _, variant := range vmdk.Variants {
		path := filepath.Join(t.TempDir(), "disk.vmdk")
		writeDisk(t, path, disk, image.CreateOptions{Variant: variant})
		out, err := exec.Command(vmdkinfo, path).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "41943040 bytes") {
			t.Errorf("%s: vmdkinfo: %v\n%s", variant, err, out)
		}
	}
}
