package vmdk_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// qemuCannot says why qemu-img is not asked. It reads every cluster of a disk, there or not, which takes minutes
// for what is larger than this.
func qemuCannot(o image.CreateOptions) string {
	if o.VirtualBytes == 0 {
		return "qemu-img takes a header of no capacity for that of a descriptor file"
	}
	if o.VirtualBytes > 16<<30 {
		return "qemu-img takes too long over a disk of this size"
	}
	return ""
}

func TestWritersRoundTrip(t *testing.T) {
	test := imagetest.WriterTest{
		Create: vmdk.Create, Open: openPath, Ext: ".vmdk", SizeUnit: 512, Qemu: "vmdk", QemuCheck: true, QemuSkip: qemuCannot,
	}
	for _, c := range []struct {
		name     string
		variants []image.CreateOptions
		unit     int64
		check    bool
		sizes    []int64
	}{
		{"sparse with small grains", []image.CreateOptions{{Variant: vmdk.MonolithicSparse, BlockBytes: 4 << 10}}, 512, true, []int64{2<<30 + 512}},
		{"by default", nil, 512, true, []int64{2<<30 + 512, 1<<40 + 512}},
		{"flat", []image.CreateOptions{{Variant: vmdk.MonolithicFlat}, {Variant: vmdk.VMFS}}, 512, false, nil},
		{"split", []image.CreateOptions{{Variant: vmdk.SplitSparse}}, 512, true, []int64{2047 << 20, 2047<<20 + 512, 5<<30 + 512}},
		{"split and flat", []image.CreateOptions{{Variant: vmdk.SplitFlat}}, 512, false, []int64{2047 << 20, 2047<<20 + 512, 5<<30 + 512}},
		{"stream", []image.CreateOptions{{Variant: vmdk.StreamOptimized}, {Variant: vmdk.StreamOptimized, Level: 1}}, 64 << 10, true, []int64{2<<30 + 512, 62 << 40}},
	} {
		t.Run(c.name, func(t *testing.T) {
			test := test
			test.Variants, test.SizeUnit, test.QemuCheck, test.Sizes = c.variants, c.unit, c.check, c.sizes
			imagetest.Writer(t, test)
		})
	}
}

// The files of a split disk are called and cut as VMware does it.
func TestSplitDiskIsCutAtWholeGrains(t *testing.T) {
	dir := t.TempDir()
	w, err := vmdk.Create(filepath.Join(dir, "my disk.vmdk"), image.CreateOptions{VirtualBytes: 5 << 30, Variant: vmdk.SplitSparse})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "my disk.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		`RW 4192256 SPARSE "my disk-s001.vmdk"`, `RW 4192256 SPARSE "my disk-s002.vmdk"`, `RW 2101248 SPARSE "my disk-s003.vmdk"`,
		`createType="twoGbMaxExtentSparse"`,
	} {
		if !strings.Contains(string(text), line+"\n") {
			t.Errorf("the descriptor lacks %s:\n%s", line, text)
		}
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*"))
	if len(files) != 4 {
		t.Errorf("files %v, want four", files)
	}
}

// A Create that fails leaves nothing behind.
func TestCreateThatFailsLeavesNoFiles(t *testing.T) {
	dir := t.TempDir()
	there := filepath.Join(dir, "disk-s002.vmdk")
	if err := os.WriteFile(there, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := vmdk.Create(filepath.Join(dir, "disk.vmdk"), image.CreateOptions{VirtualBytes: 5 << 30, Variant: vmdk.SplitSparse})
	if !os.IsExist(err) {
		t.Errorf("over a file that exists: %v", err)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*"))
	if p, _ := os.ReadFile(there); len(files) != 1 || string(p) != "mine" {
		t.Errorf("left behind: %v", files)
	}
}

func TestDiskThatGrowsWarns(t *testing.T) {
	for _, c := range []struct {
		variant string
		bytes   int64
		want    int
	}{
		{vmdk.MonolithicSparse, 512, 0}, {vmdk.MonolithicSparse, 513, 1}, {vmdk.MonolithicFlat, 513, 1},
		{vmdk.SplitSparse, 1, 1}, {vmdk.StreamOptimized, 64 << 10, 0}, {vmdk.StreamOptimized, 64<<10 + 512, 1},
	} {
		w, err := vmdk.Create(filepath.Join(t.TempDir(), "disk.vmdk"), image.CreateOptions{VirtualBytes: c.bytes, Variant: c.variant})
		if err != nil {
			t.Fatal(err)
		}
		if got := w.(interface{ Warnings() []string }).Warnings(); len(got) != c.want {
			t.Errorf("%s of %d bytes: warnings %q", c.variant, c.bytes, got)
		}
		w.Close()
	}
}
