package ova

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"path"
	"strconv"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/image"
)

// An envelope is what we need of an OVF descriptor, of any version: they
// differ in namespaces, which are not looked at, and in how a section is
// called.
type envelope struct {
	Files   []fileElement `xml:"References>File"`
	Disks   []diskElement `xml:"DiskSection>Disk"`
	Old     []diskElement `xml:"Section>Disk"` // version 0.9
	Systems []struct {
		ID   string `xml:"id,attr"`
		Name string `xml:"Name"`
	} `xml:"VirtualSystem"`
}

type fileElement struct {
	ID          string `xml:"id,attr"`
	Href        string `xml:"href,attr"`
	Compression string `xml:"compression,attr"`
	ChunkSize   string `xml:"chunkSize,attr"`
}

type diskElement struct {
	ID       string `xml:"diskId,attr"`
	FileRef  string `xml:"fileRef,attr"`
	Capacity string `xml:"capacity,attr"`
	Units    string `xml:"capacityAllocationUnits,attr"`
	Format   string `xml:"format,attr"`
	Parent   string `xml:"parentRef,attr"`

	file fileElement
}

// parseEnvelope reads the descriptor of that name. The disks that it gives
// have files.
func parseEnvelope(name string, text []byte) (envelope, error) {
	d := xml.NewDecoder(bytes.NewReader(text))
	d.CharsetReader = charset
	var e envelope
	if err := d.Decode(&e); err != nil {
		return e, fault.Corrupt(name, d.InputOffset(), "no OVF descriptor: %w", err)
	}
	byID := map[string]fileElement{}
	for _, f := range e.Files {
		byID[f.ID] = f
	}
	all := append(e.Disks, e.Old...)
	e.Disks = nil
	for _, disk := range all {
		if disk.FileRef == "" {
			continue // an empty disk, which the importer makes
		}
		f, ok := byID[disk.FileRef]
		if !ok {
			return e, fault.Corrupt(name, -1, "disk %q is in the file %q, which is not among the references", disk.ID, disk.FileRef)
		}
		disk.file = f
		e.Disks = append(e.Disks, disk)
	}
	return e, nil
}

// charset lets descriptors in the old one-byte code pages pass; beyond ASCII
// they hold texts for people.
func charset(label string, r io.Reader) (io.Reader, error) {
	switch strings.ToLower(label) {
	case "us-ascii", "ascii", "iso-8859-1", "windows-1252", "latin1":
	default:
		return nil, fmt.Errorf("a descriptor in %q: %w", label, fault.ErrUnsupported)
	}
	p, err := io.ReadAll(r)
	var b strings.Builder
	for _, c := range p {
		b.WriteRune(rune(c))
	}
	return strings.NewReader(b.String()), err
}

// bytes is the disk's size, and false where the descriptor gives none that we
// understand: "8", "byte * 2^30".
func (d diskElement) bytes() (int64, bool) {
	n, err := strconv.ParseInt(strings.TrimSpace(d.Capacity), 10, 64)
	if err != nil || n < 0 {
		return 0, false
	}
	unit := strings.ToLower(strings.Join(strings.Fields(d.Units), ""))
	factor := int64(1)
	switch unit {
	case "", "byte", "bytes":
	case "kilobytes":
		factor = 1 << 10
	case "megabytes":
		factor = 1 << 20
	case "gigabytes":
		factor = 1 << 30
	default:
		power, ok := strings.CutPrefix(unit, "byte*2^")
		bits, err := strconv.Atoi(power)
		if !ok || err != nil || bits < 0 || bits > 50 {
			return 0, false
		}
		factor = 1 << bits
	}
	if n > math.MaxInt64/factor {
		return 0, false
	}
	return n * factor, true
}

// format is what the disk is a file of, by the name that its maker gave the
// format and, where that says nothing, by the file's.
func (d diskElement) format() (image.Format, error) {
	uri := strings.ToLower(d.Format)
	for _, known := range []struct {
		part   string
		format image.Format
	}{
		{"vmdk", image.VMDK}, {"qcow", image.Qcow2}, {"vhdx", image.VHDX}, {"vhd", image.VHD},
		{"linkid=137171", image.VHD}, // what VirtualBox refers to for VHD
	} {
		if strings.Contains(uri, known.part) {
			return known.format, nil
		}
	}
	switch strings.ToLower(path.Ext(d.file.Href)) {
	case ".vmdk":
		return image.VMDK, nil
	case ".qcow2":
		return image.Qcow2, nil
	case ".vhdx":
		return image.VHDX, nil
	case ".vhd":
		return image.VHD, nil
	}
	return "", fmt.Errorf("a disk of the format %q: %w", d.Format, fault.ErrUnsupported)
}
