package restore

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/open"
	"github.com/backstay/backstay/internal/vm"
)

func TestEveryFormatIsWhatTheDiskWas(t *testing.T) {
	need(t, "qemu-img")
	const size = 9<<20 + 512 // no multiple of a chunk
	src := newDisk(size, 0, 3, 4, 17, 18)
	raw := rawFile(t, src.content)
	for _, c := range []struct {
		file, variant, qemu string
	}{
		{"disk.raw", "", "raw"},
		{"disk.img", "", "raw"},
		{"disk.qcow2", "", "qcow2"},
		{"disk.vhd", "dynamic", "vpc,force_size_calc=current_size"},
		{"disk.vhd", "fixed", "vpc,force_size_calc=current_size"},
		{"disk.vhdx", "dynamic", "vhdx"},
		{"disk.vhdx", "fixed", "vhdx"},
		{"disk.vmdk", "monolithicSparse", "vmdk"},
		{"disk.vmdk", "monolithicFlat", "vmdk"},
		{"disk.vmdk", "streamOptimized", "vmdk"},
	} {
		t.Run(c.file+" "+c.variant, func(t *testing.T) {
			dir := t.TempDir()
			target := filepath.Join(dir, c.file)
			var last int64
			res, err := Disk(t.Context(), "vda", src, target, Options{Variant: c.variant, Progress: func(done, total int64) { last = done - total }})
			if err != nil {
				t.Fatal(err)
			}
			run(t, "qemu-img", "compare", "--image-opts", "driver=raw,file.driver=file,file.filename="+raw, "driver="+c.qemu+",file.driver=file,file.filename="+target)
			if res.SizeBytes != size || res.ReadBytes != 4*step+512 || res.WrittenBytes > res.ReadBytes-192<<10 || last != 0 {
				t.Errorf("result %+v, progress ended %d before the end", res, -last)
			}
			want := c.file
			if c.variant == "monolithicFlat" {
				want = "disk-flat.vmdk disk.vmdk"
			}
			if got := ls(t, dir); got != want {
				t.Errorf("left %q, want %q", got, want)
			}
			if c.qemu == "raw" {
				if n := allocated(t, target); n > 4*step {
					t.Errorf("%d bytes allocated", n)
				}
			}
		})
	}
}

func TestOddDisks(t *testing.T) {
	for name, size := range map[string]int{"empty": 0, "one byte": 1, "one byte into the second chunk": step + 1} {
		src := newDisk(size, func() []int {
			if size == 0 {
				return nil
			}
			return []int{(size - 1) / step}
		}()...)
		target := filepath.Join(t.TempDir(), "d.raw")
		if _, err := Disk(t.Context(), "vda", src, target, Options{}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, _ := os.ReadFile(target); !bytes.Equal(got, src.content) {
			t.Errorf("%s: other bytes", name)
		}
	}
	if _, err := Disk(t.Context(), "vda", newDisk(1), filepath.Join(t.TempDir(), "d.xyz"), Options{}); err == nil {
		t.Error("an unknown extension was taken for a format")
	}
}

// Whatever goes wrong, what was at the target stays, and nothing new is left.
func TestFailureLeavesNothing(t *testing.T) {
	for _, old := range []string{"", "what was there"} {
		for name, c := range map[string]struct {
			break_ func(*fakeDisk, *Options, context.CancelFunc)
			want   error
		}{
			"corrupt chunk": {func(d *fakeDisk, _ *Options, _ context.CancelFunc) { d.corrupt = 3 }, fault.ErrCorrupt},
			"cancelled":     {func(d *fakeDisk, _ *Options, cancel context.CancelFunc) { d.during = func(int64) { cancel() } }, context.Canceled},
			"lost chunk":    {func(d *fakeDisk, _ *Options, _ context.CancelFunc) { d.lose = true }, nil},
			"disk too small": {func(_ *fakeDisk, o *Options, _ context.CancelFunc) {
				o.free = func(string) (int64, bool) { return 1 << 20, true }
			}, fault.ErrNoSpace},
			"disk full":       {func(_ *fakeDisk, o *Options, _ context.CancelFunc) { o.create = full(2 * step) }, fault.ErrNoSpace},
			"can't be synced": {func(_ *fakeDisk, o *Options, _ context.CancelFunc) { o.create = full(0) }, fault.ErrNoSpace},
		} {
			t.Run(name+" "+old, func(t *testing.T) {
				dir := t.TempDir()
				target := filepath.Join(dir, "disk.raw")
				o := Options{Force: true}
				if old != "" {
					os.WriteFile(target, []byte(old), 0o600)
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				src := newDisk(8<<20, 0, 3, 4, 5, 6)
				c.break_(src, &o, cancel)
				_, err := Disk(ctx, "vda", src, target, o)
				if err == nil || c.want != nil && !errors.Is(err, c.want) {
					t.Errorf("got %v, want %v", err, c.want)
				}
				if name == "corrupt chunk" && !strings.Contains(err.Error(), "pack 4f2a91c0") {
					t.Errorf("%v does not name the pack", err)
				}
				got, err := os.ReadFile(target)
				if old == "" && !errors.Is(err, os.ErrNotExist) || string(got) != old {
					t.Errorf("the target holds %d bytes, %v", len(got), err)
				}
				if got := ls(t, dir); got != "" && got != "disk.raw" {
					t.Errorf("left %q", got)
				}
			})
		}
	}
}

// full makes raw images on a disk with room for so many bytes, or one that
// fails when synced.
func full(room int64) func(string, image.Format, image.CreateOptions) (image.Writer, error) {
	return func(path string, f image.Format, o image.CreateOptions) (image.Writer, error) {
		w, err := open.Create(path, f, o)
		return &fullWriter{w, room}, err
	}
}

type fullWriter struct {
	image.Writer
	room int64
}

func (w *fullWriter) WriteAt(p []byte, off int64) (int, error) {
	if w.room > 0 {
		if w.room -= int64(len(p)); w.room <= 0 {
			return 0, &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}
		}
	}
	return w.Writer.WriteAt(p, off)
}

func (w *fullWriter) Finish() error {
	w.Writer.Finish()
	return &os.PathError{Op: "sync", Path: "x", Err: syscall.EDQUOT}
}

func TestTargetsThatAreRefused(t *testing.T) {
	src := newDisk(1<<20, 0)
	dir := t.TempDir()
	file, link := filepath.Join(dir, "file.raw"), filepath.Join(dir, "link.raw")
	os.WriteFile(file, []byte("old"), 0o600)
	os.Symlink(file, link)
	os.Mkdir(filepath.Join(dir, "dir.raw"), 0o700)
	for _, c := range []struct {
		name, target string
		force        bool
		want         error
	}{
		{"exists", file, false, fault.ErrExists},
		{"link", link, false, fault.ErrExists},
		{"link by force", link, true, fault.ErrExists},
		{"directory by force", filepath.Join(dir, "dir.raw"), true, fault.ErrExists},
		{"no directory", filepath.Join(dir, "none", "x.raw"), false, fault.ErrNotFound},
		{"a file for a directory", filepath.Join(file, "x.raw"), false, fault.ErrNotFound},
	} {
		if _, err := Disk(t.Context(), "vda", src, c.target, Options{Force: c.force}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if got, _ := os.ReadFile(file); string(got) != "old" {
		t.Error("the old file was touched")
	}
	if _, err := Disk(t.Context(), "vda", src, file, Options{Force: true}); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(file); !bytes.Equal(got, src.content) {
		t.Error("force did not replace the file")
	}
	if got := ls(t, dir); got != "dir.raw file.raw link.raw" {
		t.Errorf("left %q", got)
	}
}

// A file that appears while we work is not ours to replace.
func TestTargetThatAppearsMeanwhile(t *testing.T) {
	src := newDisk(4<<20, 0, 3)
	target := filepath.Join(t.TempDir(), "disk.raw")
	src.during = func(int64) { os.WriteFile(target, []byte("theirs"), 0o600) }
	if _, err := Disk(t.Context(), "vda", src, target, Options{}); !errors.Is(err, fault.ErrExists) {
		t.Errorf("got %v", err)
	}
	if got, _ := os.ReadFile(target); string(got) != "theirs" {
		t.Error("it was replaced")
	}
}

func TestOneRestorePerTarget(t *testing.T) {
	src := newDisk(4<<20, 0, 3)
	target := filepath.Join(t.TempDir(), "disk.raw")
	src.during = func(int64) {
		if _, err := Disk(t.Context(), "vda", newDisk(1<<20), target, Options{}); !errors.Is(err, fault.ErrLocked) {
			t.Errorf("a second restore got %v", err)
		}
	}
	if _, err := Disk(t.Context(), "vda", src, target, Options{}); err != nil {
		t.Fatal(err)
	}
}

func TestLeftoverOfAKilledRestoreIsTakenAway(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, partial("disk.raw"))
	os.Mkdir(left, 0o700)
	os.WriteFile(filepath.Join(left, "disk.raw"), []byte("half"), 0o600)
	src := newDisk(1<<20, 0)
	target := filepath.Join(dir, "disk.raw")
	if _, err := Disk(t.Context(), "vda", src, target, Options{}); err != nil {
		t.Fatal(err)
	}
	if got := ls(t, dir); got != "disk.raw" {
		t.Errorf("left %q", got)
	}
}

// Some formats have units larger than a chunk.
func TestUnitsLargerThanAChunk(t *testing.T) {
	src := newDisk(7*step+4096, 0, 1, 3, 7)
	w := &unitWriter{unit: 3 << 18, got: make([]byte, len(src.content))}
	o := Options{create: func(string, image.Format, image.CreateOptions) (image.Writer, error) { return w, nil }}
	if _, err := Disk(t.Context(), "vda", src, filepath.Join(t.TempDir(), "x.raw"), o); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(w.got, src.content) {
		t.Error("other bytes")
	}
	if w.last != 4 { // the units that hold data, none twice
		t.Errorf("%d writes", w.last)
	}
}

type unitWriter struct {
	unit int64
	got  []byte
	last int
}

func (w *unitWriter) WriteAt(p []byte, off int64) (int, error) {
	if off%w.unit != 0 || int64(len(p))%w.unit != 0 && off+int64(len(p)) != int64(len(w.got)) {
		return 0, errors.New("not in units")
	}
	w.last++
	return copy(w.got[off:], p), nil
}
func (w *unitWriter) Unit() int64   { return w.unit }
func (w *unitWriter) Ordered() bool { return false }
func (w *unitWriter) Finish() error { return nil }
func (w *unitWriter) Close() error  { return nil }

// What sectors a guest saw is kept where the format can say so, and told where
// it can't.
func TestDiskKeepsSectors(t *testing.T) {
	for file, want := range map[string]int{"disk.vhdx": 4096, "disk.qcow2": 0, "disk.raw": 0} {
		src := newDisk(9<<20, 0, 3)
		target := filepath.Join(t.TempDir(), file)
		o := Options{Sectors: map[vm.DiskID]int{"vda": 4096}}
		res, err := Disk(t.Context(), "vda", src, target, o)
		if err != nil || res.SectorBytes != want {
			t.Errorf("%s: sectors of %d bytes, want %d: %v", file, res.SectorBytes, want, err)
			continue
		}
		img, err := open.Open(target, open.Options{})
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		got := make([]byte, len(src.content))
		if _, err := img.ReadAt(got, 0); err != nil && err != io.EOF || !bytes.Equal(got, src.content) {
			t.Errorf("%s does not hold what was restored: %v", file, err)
		}
		if n := img.Info().SectorBytes; want > 0 && n != want {
			t.Errorf("%s says that its sectors have %d bytes", file, n)
		}
		img.Close()
		if res, err := Disk(t.Context(), "vdb", newDisk(9<<20, 0), target+".other.vhdx", o); err != nil || res.SectorBytes != 0 {
			t.Errorf("another disk: sectors of %d bytes, %v", res.SectorBytes, err)
		}
	}
}
