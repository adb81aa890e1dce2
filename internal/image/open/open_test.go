package open_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/open"
)

// makeImage writes a small image and gives what it holds.
func makeImage(t *testing.T, path string, f image.Format, o image.CreateOptions) *imagetest.Disk {
	t.Helper()
	disk := imagetest.NewDisk(7, 1<<20)
	o.VirtualBytes = disk.Size()
	w, err := open.Create(path, f, o)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, disk.Size())
	if _, err := disk.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if _, err := w.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	return disk
}

func TestEveryFormatIsFoundByItsContent(t *testing.T) {
	for _, c := range []struct {
		format  image.Format
		variant string
	}{
		{image.Raw, ""}, {image.Qcow2, ""}, {image.VHD, "fixed"}, {image.VHD, "dynamic"}, {image.VHDX, "fixed"}, {image.VHDX, "dynamic"},
		{image.VMDK, "monolithicSparse"}, {image.VMDK, "monolithicFlat"}, {image.VMDK, "streamOptimized"},
	} {
		t.Run(string(c.format)+" "+c.variant, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk")
			disk := makeImage(t, path, c.format, image.CreateOptions{Variant: c.variant})
			img, err := open.Open(path, open.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			if info := img.Info(); info.Format != c.format {
				t.Errorf("found to be %s", info.Format)
			}
			imagetest.Reader(t, img, disk)
		})
	}
}

// What a guest writes into its disk must not change how the disk is read.
func TestNamesAgainstContents(t *testing.T) {
	dir := t.TempDir()
	read := func(f image.Format, variant string) []byte {
		path := filepath.Join(t.TempDir(), "x")
		makeImage(t, path, f, image.CreateOptions{Variant: variant})
		p, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	qcow2, vhdx, vhd := read(image.Qcow2, ""), read(image.VHDX, ""), read(image.VHD, "fixed")
	nothing := make([]byte, 8192)
	polyglot := append(bytes.Clone(qcow2), vhd[len(vhd)-512:]...)
	for _, c := range []struct {
		name    string
		content []byte
		say     image.Format
		want    image.Format // empty for doubt
	}{
		{"guest.raw", qcow2, "", image.Raw},
		{"guest.IMG", vhdx, "", ""},
		{"guest.IMG", vhdx, image.Raw, image.Raw},
		{"guest.img", nothing, "", image.Raw},
		{"guest.raw", vhd, "", image.Raw},
		{"disk.qcow2", qcow2, "", image.Qcow2},
		{"disk.vhdx", qcow2, "", ""},
		{"disk.vhd", vhdx, "", ""},
		{"disk.vmdk", vhd, "", ""},
		{"disk.vhd", vhd, "", image.VHD},
		{"disk.vhd", polyglot, "", ""},
		{"disk", polyglot, "", ""},
		{"disk", polyglot, image.Qcow2, image.Qcow2},
		{"disk", polyglot, image.Raw, image.Raw},
		{"disk", vhdx, "", image.VHDX},
		{"disk", nothing, "", image.Raw},
		{"disk", nil, "", image.Raw},
		{"disk.vhdx", qcow2, image.Qcow2, image.Qcow2},
	} {
		path := filepath.Join(dir, c.name)
		if err := os.WriteFile(path, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		img, err := open.Open(path, open.Options{Format: c.say})
		switch {
		case err == nil && c.want == "":
			t.Errorf("%s with --format %q opens as %s", c.name, c.say, img.Info().Format)
		case err != nil && c.want != "":
			t.Errorf("%s with --format %q: %v", c.name, c.say, err)
		case err != nil && !errors.Is(err, open.ErrFormat):
			t.Errorf("%s with --format %q: %v is not ErrFormat", c.name, c.say, err)
		case err == nil && img.Info().Format != c.want:
			t.Errorf("%s with --format %q opens as %s, want %s", c.name, c.say, img.Info().Format, c.want)
		}
		if err == nil {
			if looksElse := c.want == image.Raw && c.say == "" && len(c.content) > 8192; looksElse != (len(img.Info().Warnings) > 0) {
				t.Errorf("%s: warnings %q", c.name, img.Info().Warnings)
			}
			img.Close()
		}
	}
}

func TestCreateNeverReplaces(t *testing.T) {
	dir := t.TempDir()
	for _, f := range []image.Format{image.Raw, image.Qcow2, image.VHD, image.VHDX, image.VMDK} {
		path := filepath.Join(dir, "disk."+string(f))
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if w, err := open.Create(path, f, image.CreateOptions{VirtualBytes: 1 << 20}); err == nil {
			w.Close()
			t.Errorf("%s: replaced an existing file", f)
		} else if !errors.Is(err, os.ErrExist) {
			t.Errorf("%s: %v", f, err)
		}
		if p, _ := os.ReadFile(path); string(p) != "precious" {
			t.Errorf("%s: the existing file is now %q", f, p)
		}
	}
}

func TestChainOpensOnlyWhenAllowed(t *testing.T) {
	for _, ext := range []string{"qcow2", "vmdk"} {
		dir := t.TempDir()
		base, top := filepath.Join(dir, "base."+ext), filepath.Join(dir, "top."+ext)
		imagetest.Qemu(t, "create", "-f", ext, base, "4M")
		imagetest.Qemu(t, "create", "-f", ext, "-b", base, "-F", ext, top)
		if _, err := open.Open(top, open.Options{}); !errors.Is(err, image.ErrNotAllowed) {
			t.Errorf("%s: without leave: %v", ext, err)
		}
		img, err := open.Open(top, open.Options{ParentDir: dir})
		if err != nil {
			t.Errorf("%s: with leave: %v", ext, err)
			continue
		}
		img.Close()
		img, err = open.Open(top, open.Options{OnlyTop: true})
		if err != nil {
			t.Errorf("%s: the top alone: %v", ext, err)
			continue
		}
		img.Close()
		// The same through another directory: the name leads outside of it.
		if _, err := open.Open(top, open.Options{ParentDir: t.TempDir()}); err == nil {
			t.Errorf("%s: opened a parent outside of the allowed directory", ext)
		}
	}
}

// Whoever watches an image must know all files that it is read from.
func TestInfoNamesAllFiles(t *testing.T) {
	dir := t.TempDir()
	flat := filepath.Join(dir, "flat.vmdk")
	makeImage(t, flat, image.VMDK, image.CreateOptions{Variant: "monolithicFlat"})
	base := filepath.Join(dir, "base.qcow2")
	makeImage(t, base, image.Qcow2, image.CreateOptions{})
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	top := filepath.Join(dir, "sub", "top.qcow2")
	makeImage(t, top, image.Qcow2, image.CreateOptions{Parent: base, ParentFormat: image.Qcow2})
	for path, want := range map[string][]string{
		flat: {"flat-flat.vmdk"}, base: nil, top: {filepath.Join("..", "base.qcow2")},
	} {
		img, err := open.Open(path, open.Options{ParentDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		if got := img.Info().Files; !slices.Equal(got, want) {
			t.Errorf("%s: files %q, want %q", path, got, want)
		}
		img.Close()
	}
}

// libvirt names backing files absolutely; disks are moved.
func TestAMovedQcow2ChainIsReadWithAWarning(t *testing.T) {
	was, is := t.TempDir(), t.TempDir()
	qemuImg := imagetest.Tool(t, "qemu-img")
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(qemuImg, args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %q: %v\n%s", args, err, out)
		}
	}
	base, top := filepath.Join(was, "base.qcow2"), filepath.Join(was, "top.qcow2")
	run("create", "-q", "-f", "qcow2", base, "1M")
	run("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
	for _, name := range []string{"base.qcow2", "top.qcow2"} {
		if err := os.Rename(filepath.Join(was, name), filepath.Join(is, name)); err != nil {
			t.Fatal(err)
		}
	}
	top = filepath.Join(is, "top.qcow2")
	if _, err := open.Open(top, open.Options{}); !errors.Is(err, image.ErrNotAllowed) {
		t.Errorf("without permission: %v", err)
	}
	img, err := open.Open(top, open.Options{ParentDir: is})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if w := img.Info().Warnings; len(w) != 1 || !strings.Contains(w[0], base) || !strings.Contains(w[0], filepath.Join(is, "base.qcow2")) {
		t.Errorf("warnings: %q", w)
	}
	// A relative name that leads nowhere is no reason to look elsewhere.
	run("rebase", "-u", "-b", "gone/base.qcow2", "-F", "qcow2", top)
	if _, err := open.Open(top, open.Options{ParentDir: is}); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("a relative name: %v", err)
	}
}
