package vmdk_test

import (
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
	imagetest.Writer(t, imagetest.WriterTest{
		Create: vmdk.Create, Open: openPath, Ext: ".vmdk", SizeUnit: 512, Qemu: "vmdk", QemuCheck: true, QemuSkip: qemuCannot,
		Variants: []image.CreateOptions{
			{Variant: vmdk.MonolithicSparse, BlockBytes: 4 << 10},
		},
		Sizes: []int64{2<<30 + 512},
	})
	imagetest.Writer(t, imagetest.WriterTest{
		Create: vmdk.Create, Open: openPath, Ext: ".vmdk", SizeUnit: 512, Qemu: "vmdk", QemuCheck: true, QemuSkip: qemuCannot,
		Sizes: []int64{2<<30 + 512, 1<<40 + 512},
	})
	imagetest.Writer(t, imagetest.WriterTest{
		Create: vmdk.Create, Open: openPath, Ext: ".vmdk", SizeUnit: 512, Qemu: "vmdk",
		Variants: []image.CreateOptions{{Variant: vmdk.MonolithicFlat}},
	})
	imagetest.Writer(t, imagetest.WriterTest{
		Create: vmdk.Create, Open: openPath, Ext: ".vmdk", SizeUnit: 64 << 10, Qemu: "vmdk", QemuCheck: true, QemuSkip: qemuCannot,
		Variants: []image.CreateOptions{
			{Variant: vmdk.StreamOptimized},
			{Variant: vmdk.StreamOptimized, Level: 1},
		},
		Sizes: []int64{2<<30 + 512, 62 << 40},
	})
}
