package open

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
)

// Old layers do not say what format their parent has. Its name decides; its
// content decides nothing, but where it contradicts the name nothing is read:
// a qcow2 parent that is taken for raw is another disk.
func TestParentWithoutAFormat(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	dir := t.TempDir()
	disk := imagetest.NewDisk(1, 1<<20)
	raw := disk.Save(t)
	for _, c := range []struct {
		name, format string
		want         error
	}{
		{"base.raw", "raw", nil},
		{"base.img", "raw", nil},
		{"base.qcow2", "qcow2", nil},
		{"other.img", "qcow2", ErrFormat},
		{"base", "raw", ErrFormat},
	} {
		base, top := filepath.Join(dir, c.name), filepath.Join(dir, "over-"+c.name+".qcow2")
		imagetest.Qemu(t, "convert", "-f", "raw", "-O", c.format, raw, base)
		imagetest.Qemu(t, "create", "-f", "qcow2", "-b", c.name, "-F", c.format, top)
		p, err := os.ReadFile(top)
		if err != nil {
			t.Fatal(err)
		}
		at := bytes.Index(p, []byte{0xe2, 0x79, 0x2a, 0xca}) // the extension with the format
		if at < 0 {
			t.Fatal("qemu-img writes no format")
		}
		p[at] = 0x11 // an extension that nobody knows
		if err := os.WriteFile(top, p, 0o600); err != nil {
			t.Fatal(err)
		}
		img, err := Open(top, Options{ParentDir: dir})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if err == nil {
			if img.Info().ParentFormat != image.Format("") {
				t.Errorf("%s: the layer says %q", c.name, img.Info().ParentFormat)
			}
			imagetest.Reader(t, img, disk)
			img.Close()
		}
	}
}
