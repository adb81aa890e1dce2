package vmdk

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// The variants that can be written.
const (
	MonolithicSparse = "monolithicSparse"
	MonolithicFlat   = "monolithicFlat"
	StreamOptimized  = "streamOptimized"
	SplitSparse      = "twoGbMaxExtentSparse"
	SplitFlat        = "twoGbMaxExtentFlat"
	VMFS             = "vmfs" // what ESXi keeps on its datastores
)

// Variants are those that Create takes, the default first.
var Variants = []string{MonolithicSparse, MonolithicFlat, StreamOptimized, SplitSparse, SplitFlat, VMFS}

const (
	usualGrain        = 64 << 10
	entriesPerTable   = 512
	descriptorSectors = 20
	// Grain tables hold 32 bits of sector number.
	maxSparseFile = 1 << 32 * sector

	// VMware cuts disks into extents of this many bytes, which file systems
	// take that know no file of 2 GiB, with room for an extent's tables.
	splitBytes  = 2047 << 20
	maxSplit    = 4096 // files, all of which are open at once
	splitTooBig = maxSplit * splitBytes
)

// Files are what a new VMDK is written to. The Writer owns them.
type Files struct {
	Disk *os.File // empty; the file that people open
	Name string   // what Disk is going to be called, without directory
	// Extra makes an empty file of that name beside Disk. It is asked for the
	// files of the variants that have several, as often as one is needed, and
	// may be nil for those that have one.
	Extra func(name string) (*os.File, error)
}

// FlatName is what VMware calls the file of the bytes beside a descriptor
// called name: disk.vmdk has its in disk-flat.vmdk.
func FlatName(name string) string { return withSuffix(name, "-flat") }

// SplitName is what VMware calls extent n, from 0 on, of a split disk: of
// disk.vmdk the first is disk-s001.vmdk, or disk-f001.vmdk of a flat one.
func SplitName(name string, n int, flat bool) string {
	kind := "s"
	if flat {
		kind = "f"
	}
	return withSuffix(name, fmt.Sprintf("-%s%03d", kind, n+1))
}

func withSuffix(name, suffix string) string {
	ext := filepath.Ext(name)
	return strings.TrimSuffix(name, ext) + suffix + ext
}

// Create makes the file path and, beside it, what else o.Variant needs: the
// files that FlatName and SplitName name. None of them may exist.
func Create(path string, o image.CreateOptions) (image.Writer, error) {
	var made []*os.File
	create := func(path string) (*os.File, error) {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err == nil {
			made = append(made, f)
		}
		return f, err
	}
	f, err := create(path)
	if err != nil {
		return nil, err
	}
	w, err := NewWriter(Files{
		Disk: f, Name: filepath.Base(path),
		Extra: func(name string) (*os.File, error) { return create(filepath.Join(filepath.Dir(path), name)) },
	}, o)
	if err != nil {
		for _, f := range made {
			f.Close()
			os.Remove(f.Name())
		}
		return nil, err
	}
	return w, nil
}

// NewWriter writes the image to fs, monolithicSparse by default. A VMDK has
// whole sectors, and a stream whole grains of 64 KiB: the disk is
// o.VirtualBytes rounded up to that and ends in zeros where bytes were added;
// then the Writer has a method Warnings that says so. Only monolithicSparse
// can be a layer over a parent, whose CID and size o.ParentInfo gives.
// If it fails, the files are the caller's as before.
func NewWriter(fs Files, o image.CreateOptions) (image.Writer, error) {
	if o.Variant == "" {
		o.Variant = MonolithicSparse
	}
	switch {
	case !slices.Contains(Variants, o.Variant):
		return nil, fmt.Errorf("no VMDK variant %q can be written: take %s", o.Variant, strings.Join(Variants, ", "))
	case o.VirtualBytes < 0 || o.VirtualBytes > maxBytes-usualGrain:
		return nil, fmt.Errorf("a VMDK of %d bytes: %w", o.VirtualBytes, fault.ErrUnsupported)
	case o.Variant != StreamOptimized && o.Compression != "":
		return nil, fmt.Errorf("a VMDK is compressed only as %s", StreamOptimized)
	case fs.Extra == nil && o.Variant != MonolithicSparse && o.Variant != StreamOptimized:
		return nil, fmt.Errorf("a VMDK as %s has several files", o.Variant)
	case !quotable(fs.Name):
		return nil, fmt.Errorf("%q cannot be a VMDK's name: its descriptor has no way to write it", fs.Name)
	}
	parent, err := parentOf(o)
	if err != nil {
		return nil, err
	}
	switch o.Variant {
	case StreamOptimized:
		return newStreamWriter(fs, o)
	case SplitSparse:
		return newSplitWriter(fs, o)
	case MonolithicSparse:
		return newSparseWriter(fs, o, parent)
	}
	return newFlatWriter(fs, o)
}

// quotable says whether a descriptor can name a file so.
func quotable(name string) bool { return !strings.ContainsAny(name, "\"\r\n\x00") }

// A parentLink is how a descriptor names the disk that its own is a layer of.
type parentLink struct {
	cid  uint32 // noParent for none
	hint string
}

func parentOf(o image.CreateOptions) (parentLink, error) {
	if o.Parent == "" {
		return parentLink{cid: noParent}, nil
	}
	no := func(format string, args ...any) (parentLink, error) {
		return parentLink{}, fmt.Errorf("a VMDK over the parent %q: "+format, append([]any{o.Parent}, args...)...)
	}
	switch {
	case o.Variant != MonolithicSparse:
		return no("only %s can be such a layer: %w", MonolithicSparse, fault.ErrUnsupported)
	case o.ParentFormat != "" && o.ParentFormat != image.VMDK:
		return no("it is a %s image, and VMware knows none but VMDKs: %w", o.ParentFormat, fault.ErrUnsupported)
	case o.ParentInfo == nil:
		return no("its CID is not known, without which no reader trusts the layer: %w", fault.ErrUnsupported)
	case ceilDiv(o.ParentInfo.VirtualBytes, sector) != ceilDiv(o.VirtualBytes, sector):
		return no("it has %d bytes and the layer %d; VMware wants them alike: %w", o.ParentInfo.VirtualBytes, o.VirtualBytes, fault.ErrUnsupported)
	case !quotable(o.Parent):
		return no("a descriptor has no way to write that name")
	}
	cid, err := strconv.ParseUint(o.ParentInfo.Identity, 16, 32)
	if err != nil || cid == noParent {
		return no("its identity %q is no CID", o.ParentInfo.Identity)
	}
	return parentLink{uint32(cid), o.Parent}, nil
}

// grown is the warning that a disk has more bytes than it was asked to have.
func grown(asked, got int64, why string) []string {
	if asked == got {
		return nil
	}
	return []string{fmt.Sprintf("the disk has %d bytes instead of %d: %s; the bytes added are zeros", got, asked, why)}
}

const wholeSectors = "a VMDK has whole sectors"
