package vmdk

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// The variants that can be written.
const (
	MonolithicSparse = "monolithicSparse"
	MonolithicFlat   = "monolithicFlat"
	StreamOptimized  = "streamOptimized"
)

const (
	usualGrain        = 64 << 10
	entriesPerTable   = 512
	descriptorSectors = 20
	// Grain tables hold 32 bits of sector number.
	maxSparseFile = 1 << 32 * sector
)

// Files are what a new VMDK is written to. The Writer owns them.
type Files struct {
	Disk *os.File // empty; the file that people open
	Name string   // what Disk is going to be called, without directory
	// Flat, empty too, takes the bytes of a monolithicFlat disk, whose Disk is
	// only the descriptor.
	Flat     *os.File
	FlatName string
}

// FlatName is what VMware calls the file of the bytes beside a descriptor
// called name: disk.vmdk has its in disk-flat.vmdk.
func FlatName(name string) string {
	ext := filepath.Ext(name)
	return strings.TrimSuffix(name, ext) + "-flat" + ext
}

// Create makes the file path, which must not exist, and its -flat file if
// o.Variant is MonolithicFlat.
func Create(path string, o image.CreateOptions) (image.Writer, error) {
	const flags = os.O_RDWR | os.O_CREATE | os.O_EXCL
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, err
	}
	fs := Files{Disk: f, Name: filepath.Base(path)}
	undo := func() {
		f.Close()
		os.Remove(path)
	}
	if o.Variant == MonolithicFlat {
		fs.FlatName = FlatName(fs.Name)
		flat := filepath.Join(filepath.Dir(path), fs.FlatName)
		if fs.Flat, err = os.OpenFile(flat, flags, 0o600); err != nil {
			undo()
			return nil, err
		}
		undo = func() {
			f.Close()
			fs.Flat.Close()
			os.Remove(path)
			os.Remove(flat)
		}
	}
	w, err := NewWriter(fs, o)
	if err != nil {
		undo()
		return nil, err
	}
	return w, nil
}

// NewWriter writes the image to fs, monolithicSparse by default. A VMDK has
// whole sectors, and a stream whole grains of 64 KiB: the disk is
// o.VirtualBytes rounded up to that and ends in zeros where bytes were added.
// If it fails, the files are the caller's as before.
func NewWriter(fs Files, o image.CreateOptions) (image.Writer, error) {
	switch {
	case o.VirtualBytes < 0 || o.VirtualBytes > maxBytes-usualGrain:
		return nil, fmt.Errorf("a VMDK of %d bytes: %w", o.VirtualBytes, fault.ErrUnsupported)
	case o.Parent != "":
		return nil, fmt.Errorf("a VMDK over a parent: %w", fault.ErrUnsupported)
	case strings.ContainsAny(fs.Name+fs.FlatName, "\"\r\n\x00"):
		return nil, fmt.Errorf("%q cannot be a VMDK's name: its descriptor has no way to write it", fs.Name)
	}
	switch o.Variant {
	case "", MonolithicSparse:
		return newSparseWriter(fs, o)
	case MonolithicFlat:
		return newFlatWriter(fs, o)
	case StreamOptimized:
		return newStreamWriter(fs, o)
	}
	return nil, fmt.Errorf("no VMDK variant %q can be written: take %s, %s or %s", o.Variant, MonolithicSparse, MonolithicFlat, StreamOptimized)
}

// plainOnly refuses what a variant without compression does not have.
func plainOnly(o image.CreateOptions) error {
	if o.Compression != "" {
		return fmt.Errorf("a VMDK is compressed only as %s", StreamOptimized)
	}
	return nil
}
