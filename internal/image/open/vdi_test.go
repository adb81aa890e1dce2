package open

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/imagetest"
	"github.com/backstay/backstay/internal/image/vdi"
)

// A differencing VDI knows its parent by UUID, so it is found under any name,
// and in the directory above.
func TestParentOfAVDI(t *testing.T) {
	imagetest.Tool(t, "qemu-img")
	dir := t.TempDir()
	disk := imagetest.NewDisk(1, 3<<20)
	base := filepath.Join(dir, "My disk.vdi")
	imagetest.Qemu(t, "convert", "-f", "raw", "-O", "vdi", disk.Save(t), base)
	child := filepath.Join(dir, "Snapshots", "child.vdi")
	if err := os.Mkdir(filepath.Dir(child), 0o700); err != nil {
		t.Fatal(err)
	}
	imagetest.Qemu(t, "create", "-f", "vdi", child, "3M")
	p, err := os.ReadFile(base)
	if err != nil {
		t.Fatal(err)
	}
	q, err := os.ReadFile(child)
	if err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint32(q[76:], 4) // differencing
	copy(q[424:456], p[392:424])             // the UUIDs of image and modification
	if err := os.WriteFile(child, q, 0o600); err != nil {
		t.Fatal(err)
	}

	if _, err := Open(child, Options{}); !errors.Is(err, image.ErrNotAllowed) {
		t.Errorf("nothing is allowed: %v", err)
	}
	if _, err := Open(child, Options{ParentDir: filepath.Dir(child)}); !errors.Is(err, fault.ErrNotFound) {
		t.Errorf("the parent lies above what is allowed: %v", err)
	}
	img, err := Open(child, Options{ParentDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	imagetest.Reader(t, img, disk)
	if files := img.Info().Files; len(files) != 1 || files[0] != filepath.Join("..", "My disk.vdi") {
		t.Errorf("files %q", files)
	}
	img.Close()

	// Two files with one UUID: nothing says which of them is right.
	if err := os.WriteFile(filepath.Join(dir, "copy.vdi"), p, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(child, Options{ParentDir: dir}); !errors.Is(err, fault.ErrUnsupported) {
		t.Errorf("two parents: %v", err)
	}
	// One of them has the name that VirtualBox gives a snapshot.
	f, err := image.OpenFile(base)
	if err != nil {
		t.Fatal(err)
	}
	id, err := vdi.UUID(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "copy.vdi"), filepath.Join(dir, "Snapshots", vdi.ParentName(id))); err != nil {
		t.Fatal(err)
	}
	if img, err = Open(child, Options{ParentDir: dir}); err != nil {
		t.Fatal(err)
	}
	imagetest.Reader(t, img, disk)
	img.Close()
}
