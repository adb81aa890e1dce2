package vhd

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

func TestWhatQemuWrites(t *testing.T) {
	disk := imagetest.NewDisk(3, 9<<20+1536)
	raw := disk.Save(t)
	for _, options := range []string{
		"subformat=dynamic", "subformat=fixed",
		"subformat=dynamic,force_size=on", "subformat=fixed,force_size=on",
	} {
		t.Run(options, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.vhd")
			imagetest.Qemu(t, "convert", "-f", "raw", "-O", "vpc", "-o", options, raw, path)
			img, err := openPath(path)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			exact := strings.Contains(options, "force_size")
			if exact != (img.Size() == disk.Size()) || img.Size() < disk.Size() {
				t.Errorf("%d bytes, the disk has %d", img.Size(), disk.Size())
			}
			imagetest.Reader(t, img, imagetest.QemuRaw(t, path, "vpc"))
			if strings.Contains(options, "dynamic") {
				sameMap(t, img, path)
			}
		})
	}
}

// Extents agree with qemu-img map on dynamic disks. Of fixed ones qemu tells
// the file's holes.
func TestExtentsAgreeWithQemu(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.vhd")
	write(t, path, imagetest.NewDisk(4, 300<<20), image.CreateOptions{})
	img, err := openPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	sameMap(t, img, path)
}

func sameMap(t *testing.T, img image.Image, path string) {
	t.Helper()
	var list []struct {
		Start, Length int64
		Data          bool
		Offset        *int64
	}
	if err := json.Unmarshal([]byte(imagetest.Qemu(t, "map", "-f", "vpc", "--output=json", path)), &list); err != nil {
		t.Fatal(err)
	}
	for _, q := range list {
		within := extent.Extent{Off: q.Start, Len: min(q.Length, img.Size()-q.Start)}
		for e, err := range img.Extents(t.Context(), within) {
			if err != nil {
				t.Fatal(err)
			}
			if (e.Kind == image.Data) != q.Data || q.Offset != nil && e.FileOffset != *q.Offset+e.Off-q.Start {
				t.Errorf("%+v, but qemu says %+v", e, q)
			}
		}
	}
}
