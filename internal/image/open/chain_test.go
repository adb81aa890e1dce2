package open_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/open"
)

// makeChild writes an empty layer over the image parent, whose name in the
// header is name.
func makeChild(t *testing.T, path, parent, name string) {
	t.Helper()
	img, err := open.Open(parent, open.Options{OnlyTop: true})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	info := img.Info()
	w, err := open.Create(path, info.Format, image.CreateOptions{VirtualBytes: img.Size(), Parent: name, ParentFormat: info.Format, ParentInfo: &info})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
}

// layers are the files of a chain relative to dir.
func layers(t *testing.T, dir, top string, o open.Options) ([]string, error) {
	t.Helper()
	var list []string
	err := open.Chain(top, o, func(path string, layer image.Image) error {
		rel, err := filepath.Rel(dir, path)
		list = append(list, filepath.ToSlash(rel))
		return err
	})
	return list, err
}

func TestChainShowsEveryLayer(t *testing.T) {
	for _, f := range []image.Format{image.Qcow2, image.VHD, image.VHDX, image.VMDK} {
		t.Run(string(f), func(t *testing.T) {
			dir := t.TempDir()
			path := func(name string) string { return filepath.Join(dir, name+"."+string(f)) }
			disk := makeImage(t, path("base"), f, image.CreateOptions{})
			if err := os.MkdirAll(filepath.Join(dir, "snaps"), 0o700); err != nil {
				t.Fatal(err)
			}
			// Names are relative to the file that holds them.
			makeChild(t, path("snaps/one"), path("base"), "../base."+string(f))
			makeChild(t, path("snaps/two"), path("snaps/one"), "one."+string(f))
			o := open.Options{ParentDir: dir}
			want := []string{"snaps/two." + string(f), "snaps/one." + string(f), "base." + string(f)}
			if got, err := layers(t, dir, path("snaps/two"), o); err != nil || !slices.Equal(got, want) {
				t.Errorf("%q, %v; want %q", got, err, want)
			}
			img, err := open.Open(path("snaps/two"), o)
			if err != nil {
				t.Fatal(err)
			}
			imagetest.Reader(t, img, disk)
			img.Close()

			if got, err := layers(t, dir, path("snaps/two"), open.Options{}); !errors.Is(err, image.ErrNotAllowed) || !slices.Equal(got, want[:1]) {
				t.Errorf("without leave: %q, %v", got, err)
			}
			// The base gets another name.
			if err := os.Rename(path("base"), path("moved")); err != nil {
				t.Fatal(err)
			}
			got, err := layers(t, dir, path("snaps/two"), o)
			if !errors.Is(err, fault.ErrNotFound) || !slices.Equal(got, want[:2]) {
				t.Errorf("without the base: %q, %v", got, err)
			}
			var renamed *open.RenamedError
			if found := errors.As(err, &renamed); found != (f != image.Qcow2) || found && renamed.File != path("moved") {
				t.Errorf("the renamed base: %+v", renamed)
			}
			if _, err := open.Open(path("snaps/two"), o); !errors.Is(err, fault.ErrNotFound) || errors.As(err, &renamed) != (f != image.Qcow2) {
				t.Errorf("Open: %v", err)
			}
		})
	}
}

func TestChainWithTheWrongParent(t *testing.T) {
	for _, f := range []image.Format{image.VHD, image.VHDX, image.VMDK} {
		dir := t.TempDir()
		base, top, right := filepath.Join(dir, "base."+string(f)), filepath.Join(dir, "top."+string(f)), filepath.Join(dir, "kept."+string(f))
		makeImage(t, base, f, image.CreateOptions{})
		makeChild(t, top, base, "base."+string(f))
		if err := os.Rename(base, right); err != nil {
			t.Fatal(err)
		}
		makeImage(t, base, f, image.CreateOptions{})
		got, err := layers(t, dir, top, open.Options{ParentDir: dir})
		var renamed *open.RenamedError
		if !errors.Is(err, fault.ErrCorrupt) || len(got) != 1 || !errors.As(err, &renamed) || renamed.File != right {
			t.Errorf("%s: %q, %v", f, got, err)
		}
	}
}

func TestChainsThatDoNotEnd(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "b.qcow2")
	over := func(path, parent string) {
		w, err := open.Create(path, image.Qcow2, image.CreateOptions{VirtualBytes: 1 << 20, Parent: parent, ParentFormat: image.Qcow2})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Finish(); err != nil {
			t.Fatal(err)
		}
	}
	over(a, "b.qcow2")
	over(b, "a.qcow2")
	if got, err := layers(t, dir, a, open.Options{ParentDir: dir}); !errors.Is(err, fault.ErrCorrupt) || len(got) != 2 {
		t.Errorf("a loop: %q, %v", got, err)
	}
	const deep = image.MaxDepth + 2
	for i := range deep {
		over(filepath.Join(dir, fmt.Sprintf("%d.qcow2", i)), fmt.Sprintf("%d.qcow2", i+1))
	}
	makeImage(t, filepath.Join(dir, fmt.Sprintf("%d.qcow2", deep)), image.Qcow2, image.CreateOptions{})
	if got, err := layers(t, dir, filepath.Join(dir, "0.qcow2"), open.Options{ParentDir: dir}); !errors.Is(err, fault.ErrCorrupt) || len(got) != image.MaxDepth+1 {
		t.Errorf("too deep: %d layers, %v", len(got), err)
	}
	if _, err := open.Open(filepath.Join(dir, "0.qcow2"), open.Options{ParentDir: dir}); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("too deep: %v", err)
	}
	if got, err := layers(t, dir, filepath.Join(dir, "2.qcow2"), open.Options{ParentDir: dir}); err != nil || len(got) != image.MaxDepth+1 {
		t.Errorf("as deep as may be: %d layers, %v", len(got), err)
	}
}
