package vmdk_test

import (
	"os"
	"path/filepath"
	"testing"

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
	var opener func(f image.File, _ image.Format, parent image.OpenParent) (image.Image, error)
	opener = func(f image.File, _ image.Format, parent image.OpenParent) (image.Image, error) {
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
			if img.Size() > 4<<30 && os.Getenv("BACKSTAY_MAY_NOT_SKIP") != "1" {
				// A minute of hashing zeros is for CI; elsewhere its extents do.
				imagetest.Reader(t, img, imagetest.QemuRaw(t, path, "vmdk"))
				return
			}
			if got := imagetest.Hash(t, img, img.Size()); got != want {
				t.Errorf("content hashes to %s, want %s", got, want)
			}
		})
	}
}
