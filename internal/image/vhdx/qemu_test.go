package vhdx

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/image/imagetest"
)

func TestWhatQemuWrites(t *testing.T) {
	disk := imagetest.NewDisk(3, 9<<20+1536)
	raw := disk.Save(t)
	for _, options := range []string{
		"subformat=dynamic", "subformat=fixed",
		"subformat=dynamic,block_size=1M", "subformat=dynamic,block_size=256M",
		"subformat=dynamic,block_state_zero=off", "subformat=dynamic,log_size=8M",
	} {
		t.Run(options, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.vhdx")
			imagetest.Qemu(t, "convert", "-f", "raw", "-O", "vhdx", "-o", options, raw, path)
			img, err := openPath(path)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			if img.Size() != disk.Size() || !strings.HasPrefix(img.Info().Creator, "QEMU") {
				t.Errorf("%+v", img.Info())
			}
			imagetest.Reader(t, img, disk)
		})
	}
}
