package convert_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/convert"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/open"
)

// A stack is a base and a layer over it in one directory, with what a guest
// sees of both.
type stack struct {
	dir    string
	base   string // name
	top    string // path
	info   image.Info
	merged []byte
}

const stackBytes = 8 << 20

// makeStack writes to the layer in units, data and zeros.
func makeStack(t *testing.T, f image.Format, unit int64) stack {
	t.Helper()
	s := stack{dir: t.TempDir(), base: "base." + string(f)}
	s.top = filepath.Join(s.dir, "top."+string(f))
	disk := imagetest.NewDisk(31, stackBytes)
	s.merged = make([]byte, stackBytes)
	if _, err := disk.ReadAt(s.merged, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	write(t, filepath.Join(s.dir, s.base), f, image.CreateOptions{VirtualBytes: stackBytes}, func(w image.Writer) error {
		_, err := w.WriteAt(s.merged, 0)
		return err
	})
	base, err := open.Open(filepath.Join(s.dir, s.base), open.Options{Format: f})
	if err != nil {
		t.Fatal(err)
	}
	s.info = base.Info()
	base.Close()
	r := rand.New(rand.NewPCG(5, uint64(unit)))
	write(t, s.top, f, s.overBase(), func(w image.Writer) error {
		for off := int64(0); off < stackBytes; {
			off += (1 + r.Int64N(40)) * unit
			n := min((1+r.Int64N(10))*unit, stackBytes-off)
			if n <= 0 {
				break
			}
			p := s.merged[off : off+n]
			clear(p)
			if r.IntN(3) > 0 {
				for i := range p {
					p[i] = byte(i>>9) | 1
				}
			}
			if _, err := w.WriteAt(p, off); err != nil {
				return err
			}
			off += n
		}
		return nil
	})
	return s
}

// overBase are the options of a layer over the stack's base.
func (s stack) overBase() image.CreateOptions {
	return image.CreateOptions{VirtualBytes: stackBytes, Parent: s.base, ParentFormat: s.info.Format, ParentInfo: &s.info}
}

func write(t *testing.T, path string, f image.Format, o image.CreateOptions, put func(image.Writer) error) {
	t.Helper()
	w, err := open.Create(path, f, o)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := put(w); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
}

// A layer that was copied shows, over the same parent, the same disk, and
// holds no more than before, in units.
func TestCopiedLayerShowsTheSameDisk(t *testing.T) {
	for _, c := range []struct {
		from, to image.Format
		unit     int64 // in which the layer was written
		o        image.CreateOptions
		whole    bool // needs the parent for the rest of units
	}{
		{image.Qcow2, image.Qcow2, 64 << 10, image.CreateOptions{}, false},
		{image.Qcow2, image.Qcow2, 64 << 10, image.CreateOptions{BlockBytes: 4 << 10}, false},
		{image.Qcow2, image.Qcow2, 64 << 10, image.CreateOptions{BlockBytes: 1 << 20}, true},
		{image.Qcow2, image.Qcow2, 64 << 10, image.CreateOptions{Compression: "zstd"}, false},
		{image.VHD, image.VHD, 512, image.CreateOptions{}, false},
		{image.VHDX, image.VHDX, 512, image.CreateOptions{}, false},
		{image.VHDX, image.VHDX, 512, image.CreateOptions{BlockBytes: 1 << 20}, false},
		{image.VHDX, image.Qcow2, 512, image.CreateOptions{}, true},
		{image.VMDK, image.VMDK, 64 << 10, image.CreateOptions{}, false},
	} {
		t.Run(fmt.Sprintf("%s to %s,%d,%s", c.from, c.to, c.o.BlockBytes, c.o.Compression), func(t *testing.T) {
			s := makeStack(t, c.from, c.unit)
			layer, err := open.Open(s.top, open.Options{OnlyTop: true})
			if err != nil {
				t.Fatal(err)
			}
			defer layer.Close()
			whole, err := open.Open(s.top, open.Options{ParentDir: s.dir})
			if err != nil {
				t.Fatal(err)
			}
			defer whole.Close()
			o := s.overBase()
			o.BlockBytes, o.Compression = c.o.BlockBytes, c.o.Compression
			path := filepath.Join(s.dir, "copy."+string(c.to))
			if c.whole {
				write(t, filepath.Join(s.dir, "no."+string(c.to)), c.to, o, func(w image.Writer) error {
					if _, err := convert.CopyLayer(t.Context(), w, layer, nil, convert.Options{}); !errors.Is(err, convert.ErrPartial) {
						t.Errorf("without the parent: %v", err)
					}
					return nil
				})
			} else {
				whole = nil
			}
			write(t, path, c.to, o, func(w image.Writer) error {
				var err error
				if whole == nil {
					_, err = convert.CopyLayer(t.Context(), w, layer, nil, convert.Options{})
				} else {
					_, err = convert.CopyLayer(t.Context(), w, layer, whole, convert.Options{})
				}
				return err
			})
			img, err := open.Open(path, open.Options{ParentDir: s.dir})
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			imagetest.Reader(t, img, bytes.NewReader(s.merged))
			alone, err := open.Open(path, open.Options{OnlyTop: true})
			if err != nil {
				t.Fatal(err)
			}
			defer alone.Close()
			have, want := held(t, layer), held(t, alone)
			if !c.whole && have != want {
				t.Errorf("the layer holds %d bytes and its copy %d", have, want)
			}
			if c.to == image.Qcow2 && c.from == image.Qcow2 {
				raw := filepath.Join(s.dir, "merged.raw")
				if err := os.WriteFile(raw, s.merged, 0o600); err != nil {
					t.Fatal(err)
				}
				imagetest.QemuCompare(t, raw, "raw", path, "qcow2")
				imagetest.Qemu(t, "check", "-f", "qcow2", path)
			}
		})
	}
}

// held is how many bytes of the disk the layer holds itself.
func held(t *testing.T, layer image.Image) (n int64) {
	t.Helper()
	for e, err := range convert.Map(t.Context(), layer, wholeOf(layer)) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind != image.Absent {
			n += e.Len
		}
	}
	return n
}
