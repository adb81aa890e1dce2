package open_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
)

// What CheckCreate lets pass is written, and what it refuses is not.
func TestCheckCreateKnowsWhatCreateDoes(t *testing.T) {
	variants, compressions := []string{"", "nonsense"}, []string{"", "nonsense"}
	for _, f := range open.Formats() {
		variants = append(variants, open.Variants(f)...)
		compressions = append(compressions, open.Compressions(f)...)
	}
	dir := t.TempDir()
	n := 0
	for _, f := range open.Formats() {
		for _, v := range variants {
			for _, c := range compressions {
				for _, sector := range []int{0, 512, 4096, 520} {
					o := image.CreateOptions{VirtualBytes: 64 << 20, Variant: v, Compression: c, SectorBytes: sector}
					n++
					path := filepath.Join(dir, fmt.Sprintf("%d.%s", n, f))
					refused := open.CheckCreate(f, o)
					if refused != nil && !errors.Is(refused, open.ErrOption) {
						t.Errorf("%s %+v: %v is no ErrOption", f, o, refused)
					}
					if v == "nonsense" && refused == nil || v == "nonsense" && len(open.Variants(f)) > 0 && !strings.Contains(refused.Error(), open.Variants(f)[0]) {
						t.Errorf("%s %+v: %v", f, o, refused)
					}
					if refused != nil {
						continue
					}
					w, err := open.Create(path, f, o)
					if err != nil {
						t.Errorf("%s %+v passes, yet Create says %v", f, o, err)
						continue
					}
					w.Close()
				}
			}
		}
	}
}

func TestCheckCreateOfNumbers(t *testing.T) {
	for _, c := range []struct {
		f  image.Format
		o  image.CreateOptions
		ok bool
	}{
		{image.Raw, image.CreateOptions{BlockBytes: 4096}, false},
		{image.Raw, image.CreateOptions{Parent: "base.raw"}, false},
		{image.Raw, image.CreateOptions{Variant: "fixed"}, false},
		{image.Qcow2, image.CreateOptions{BlockBytes: 512}, true},
		{image.Qcow2, image.CreateOptions{BlockBytes: 1000}, false},
		{image.Qcow2, image.CreateOptions{BlockBytes: 4 << 20}, false},
		{image.Qcow2, image.CreateOptions{Level: 3}, false},
		{image.Qcow2, image.CreateOptions{Level: 9, Compression: "zlib"}, true},
		{image.Qcow2, image.CreateOptions{Level: 10, Compression: "zlib"}, false},
		{image.Qcow2, image.CreateOptions{Level: 19, Compression: "zstd"}, true},
		{image.Qcow2, image.CreateOptions{Level: -1, Compression: "zstd"}, false},
		{image.Qcow2, image.CreateOptions{Parent: "base.qcow2"}, true},
		{image.VHD, image.CreateOptions{Parent: "base.vhd", Variant: "fixed"}, false},
		{image.VHD, image.CreateOptions{Variant: "differencing"}, false},
		{image.VHDX, image.CreateOptions{Parent: "base.vhdx", Variant: "differencing", SectorBytes: 4096}, true},
		{image.VHDX, image.CreateOptions{BlockBytes: 512 << 20}, false},
		{image.VMDK, image.CreateOptions{Variant: "streamOptimized", Level: 9}, true},
		{image.VMDK, image.CreateOptions{Level: 9}, false},
		{"floppy", image.CreateOptions{}, false},
	} {
		if err := open.CheckCreate(c.f, c.o); (err == nil) != c.ok || err != nil && !errors.Is(err, open.ErrOption) {
			t.Errorf("%s %+v: %v", c.f, c.o, err)
		}
	}
}
