package restore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/nbd"
)

// changed is an image of src at path in which some bytes have changed since:
// in two chunks of data and in one that was a hole.
func changed(t *testing.T, src *fakeDisk, path string, o Options) {
	t.Helper()
	now := newDisk(len(src.content))
	copy(now.content, src.content)
	now.content[3*step+5]++
	clear(now.content[4*step : 5*step])
	copy(now.content[9*step+7:], "written by the guest")
	if _, err := Disk(t.Context(), "vda", now, path, o); err != nil {
		t.Fatal(err)
	}
}

func TestInPlaceWritesOnlyWhatDiffers(t *testing.T) {
	need(t, "qemu-img", "qemu-nbd")
	src := newDisk(12<<20+512, 0, 3, 4, 5, 23, 24)
	raw := rawFile(t, src.content)
	for _, c := range []struct {
		file, variant, qemu string
	}{
		{"disk.raw", "", "raw"},
		{"disk.qcow2", "", "qcow2"},
		{"a,b.qcow2", "", "qcow2"}, // the comma means something to qemu-nbd
		{"disk.vhd", "fixed", "vpc,force_size_calc=current_size"},
		{"disk.vhd", "dynamic", "vpc,force_size_calc=current_size"},
		{"disk.vmdk", "monolithicSparse", "vmdk"},
		{"disk.vmdk", "monolithicFlat", "vmdk"},
	} {
		t.Run(c.file+" "+c.variant, func(t *testing.T) {
			dir := t.TempDir()
			target := filepath.Join(dir, c.file)
			changed(t, src, target, Options{Variant: c.variant})
			src.fetched.Store(0)
			var done, total int64
			res, err := InPlace(t.Context(), &fakeRepo{}, src, target, Options{Workers: 1, Progress: func(d, n int64) { done, total = d, n }})
			if err != nil {
				t.Fatal(err)
			}
			if res.WrittenBytes != 2*step || res.ReadBytes != 2*step || src.fetched.Load() != 2*step || res.ZeroedBytes != step {
				t.Errorf("wrote %d, zeroed %d, fetched %d", res.WrittenBytes, res.ZeroedBytes, src.fetched.Load())
			}
			if done != total {
				t.Errorf("progress ended at %d of %d", done, total)
			}
			run(t, "qemu-img", "compare", "--image-opts", "driver=raw,file.driver=file,file.filename="+raw,
				"driver="+c.qemu+",file.driver=file,file.filename="+strings.ReplaceAll(target, ",", ",,"))
			if strings.Contains(ls(t, dir), "backstay") {
				t.Errorf("left %q", ls(t, dir))
			}
			if c.qemu == "raw" {
				if n := allocated(t, target); n > 6*step {
					t.Errorf("%d bytes allocated: what is zero again should be a hole", n)
				}
			}
			// A second time there is nothing to do, and nothing is touched.
			before, _ := os.Stat(target)
			res, err = InPlace(t.Context(), &fakeRepo{}, src, target, Options{})
			if err != nil || res.WrittenBytes+res.ZeroedBytes != 0 || res.SkippedBytes == 0 {
				t.Errorf("the second time: %+v, %v", res, err)
			}
			if after, _ := os.Stat(target); c.qemu == "raw" && !after.ModTime().Equal(before.ModTime()) {
				t.Error("an equal image was written to")
			}
		})
	}
}

func TestInPlaceInterrupted(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "disk.raw")
	src := newDisk(12<<20, 0, 3, 4, 5)
	changed(t, src, target, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	src.during = func(int64) {
		if _, err := os.Stat(Marker(target)); err != nil {
			t.Error("writing began without a marker")
		}
		cancel()
	}
	_, err := InPlace(ctx, &fakeRepo{}, src, target, Options{})
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), Marker(target)) {
		t.Errorf("got %v", err)
	}
	if text, err := os.ReadFile(Marker(target)); err != nil || !bytes.Contains(text, []byte("disk.raw in place")) {
		t.Errorf("the marker says %q, %v", text, err)
	}
	src.during = nil
	if _, err := InPlace(t.Context(), &fakeRepo{}, src, target, Options{}); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(target); !bytes.Equal(got, src.content) {
		t.Error("the second run did not complete it")
	}
	if ls(t, dir) != "disk.raw" {
		t.Errorf("left %q", ls(t, dir))
	}
	// A whole new image by force completes it too.
	os.WriteFile(Marker(target), nil, 0o600)
	if _, err := Disk(t.Context(), "vda", src, target, Options{Force: true}); err != nil {
		t.Fatal(err)
	}
	if ls(t, dir) != "disk.raw" {
		t.Errorf("left %q", ls(t, dir))
	}
}

func TestInPlaceRefusals(t *testing.T) {
	need(t, "qemu-img", "qemu-nbd")
	dir := t.TempDir()
	src := newDisk(4<<20, 0, 3)
	at := func(name string) string { return filepath.Join(dir, name) }
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", at("size.qcow2"), "5M")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", at("hidden.img"), "4M")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", at("noext"), "4M")
	os.WriteFile(at("size.raw"), make([]byte, 4<<20+1), 0o600)
	os.WriteFile(at("no.qcow2"), make([]byte, 4<<20), 0o600)
	for _, c := range []struct {
		name, file string
		want       error
	}{
		{"nothing there", "none.raw", fault.ErrNotFound},
		{"another size, qcow2", "size.qcow2", nil},
		{"another size, raw", "size.raw", nil},
		{"qcow2 called .img", "hidden.img", nil},
		{"qcow2 without extension", "noext", nil},
		{"no qcow2 at all", "no.qcow2", nil},
		{"directory", ".", nil},
	} {
		_, err := InPlace(t.Context(), &fakeRepo{}, src, at(c.file), Options{})
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	t.Setenv("PATH", "")
	if _, err := InPlace(t.Context(), &fakeRepo{}, src, at("size.qcow2"), Options{}); !errors.Is(err, fault.ErrUnsupported) || !strings.Contains(err.Error(), "qemu-utils") {
		t.Errorf("without qemu-nbd: %v", err)
	}
}

// hold opens path with a qemu-nbd, as a running VM would, until the test ends.
func hold(t *testing.T, path, format string, args ...string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "hold")
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "s")
	cmd := exec.Command("qemu-nbd", append(args, "--persistent", "--socket="+sock, "--format="+format, path)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait(); os.RemoveAll(dir) })
	for range 30_000 {
		// It listens before it opens the image, and talks after.
		if c, err := nbd.Dial(t.Context(), nbd.Target{Network: "unix", Address: sock}); err == nil {
			t.Cleanup(func() { c.Close() })
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("qemu-nbd does not come up")
}

func TestAnImageInUseIsLeftAlone(t *testing.T) {
	need(t, "qemu-nbd", "qemu-img")
	for _, c := range []struct {
		format image.Format
		args   []string
	}{{image.Raw, nil}, {image.Qcow2, nil}, {image.Raw, []string{"--read-only"}}} {
		t.Run(fmt.Sprint(c.format, c.args), func(t *testing.T) {
			target := filepath.Join(t.TempDir(), "disk"+Extension(c.format))
			src := newDisk(12<<20, 0, 3, 4, 5)
			changed(t, src, target, Options{})
			hold(t, target, string(c.format), c.args...)
			if _, err := InPlace(t.Context(), &fakeRepo{}, src, target, Options{}); !errors.Is(err, fault.ErrLocked) {
				t.Errorf("in place: %v", err)
			}
			if _, err := Disk(t.Context(), "vda", src, target, Options{Force: true}); !errors.Is(err, fault.ErrLocked) {
				t.Errorf("by force: %v", err)
			}
		})
	}
}

func TestNobodyOpensAnImageThatWeWrite(t *testing.T) {
	need(t, "qemu-io")
	target := filepath.Join(t.TempDir(), "disk.raw")
	src := newDisk(12<<20, 0, 3, 4, 5)
	changed(t, src, target, Options{})
	src.during = func(int64) {
		if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", target).CombinedOutput(); err == nil {
			t.Errorf("qemu wrote to it: %s", out)
		}
		if _, err := InPlace(t.Context(), &fakeRepo{}, newDisk(12<<20), target, Options{}); !errors.Is(err, fault.ErrLocked) {
			t.Errorf("a second restore got %v", err)
		}
	}
	if _, err := InPlace(t.Context(), &fakeRepo{}, src, target, Options{}); err != nil {
		t.Fatal(err)
	}
}

// Whatever an image held before, afterwards it holds the disk.
func TestInPlaceFromAnything(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	for range 30 {
		size := 1 + r.IntN(6*step)
		pick := func() (c []int) {
			for i := range (size + step - 1) / step {
				if r.IntN(2) == 0 {
					c = append(c, i)
				}
			}
			return c
		}
		target := filepath.Join(t.TempDir(), "disk.raw")
		if _, err := Disk(t.Context(), "vda", newDisk(size, pick()...), target, Options{}); err != nil {
			t.Fatal(err)
		}
		src := newDisk(size, pick()...)
		if _, err := InPlace(t.Context(), &fakeRepo{}, src, target, Options{}); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if got, _ := os.ReadFile(target); !bytes.Equal(got, src.content) {
			t.Fatalf("seed %d: other bytes", seed)
		}
	}
}
