package qcow2

import (
	"fmt"

	"github.com/backstay/backstay/internal/image"
)

// Info describes the image.
func (img *Image) Info() image.Info {
	h := &img.header
	info := image.Info{
		Format:        image.Qcow2,
		Version:       int(h.version),
		VirtualBytes:  img.active.size,
		FileBytes:     img.file.Bytes(),
		BlockBytes:    h.clusterBytes(),
		SectorBytes:   512,
		Compression:   "zlib",
		Parent:        h.backing,
		Warnings:      append([]string(nil), img.warnings...),
		FormatDetails: img.details(),
	}
	if h.compression == compressZstd {
		info.Compression = "zstd"
	}
	if f, err := parentFormat(h.backingFormat); err == nil {
		info.ParentFormat = f
	}
	if img.data != img.file && img.data != nil {
		info.FileBytes += img.data.Bytes()
	}
	for i, s := range img.snapshots {
		if i == listed {
			info.Warnings = append(info.Warnings, fmt.Sprintf("of %d snapshots only the first %d are listed", len(img.snapshots), listed))
			break
		}
		info.Snapshots = append(info.Snapshots, s.Name)
		info.SnapshotInfo = append(info.SnapshotInfo, image.SnapshotInfo{
			ID: s.ID, Name: s.Name, Made: s.Made, VirtualBytes: s.VirtualBytes, StateBytes: s.StateBytes,
		})
	}
	for i, b := range img.bitmaps {
		if i == listed {
			info.Warnings = append(info.Warnings, fmt.Sprintf("of %d bitmaps only the first %d are listed", len(img.bitmaps), listed))
			break
		}
		info.Bitmaps = append(info.Bitmaps, b.Name)
		info.BitmapInfo = append(info.BitmapInfo, image.BitmapInfo{
			Name: b.Name, Granularity: b.Granularity, Recording: b.Auto, Trusted: img.trusted(&b) == "",
		})
	}
	return info
}

// details is what only qcow2 has.
func (img *Image) details() map[string]string {
	h := &img.header
	d := map[string]string{"refcount_bits": fmt.Sprint(h.refcountBits), "compat": "1.1"}
	if h.version == 2 {
		d["compat"] = "0.10" // as qemu-img calls it
	}
	for key, set := range map[string]bool{
		"dirty":          h.incompatible&incompatDirty != 0,
		"corrupt":        h.incompatible&incompatCorrupt != 0,
		"extended_l2":    h.extendedL2(),
		"lazy_refcounts": h.compatible&compatLazyRefcounts != 0,
		"raw_data_file":  h.autoclear&autoclearRawData != 0,
	} {
		if set {
			d[key] = "true"
		}
	}
	if h.dataFile != "" {
		d["data_file"] = h.dataFile
	}
	if f, err := parentFormat(h.backingFormat); err != nil || string(f) != h.backingFormat {
		d["backing_format"] = h.backingFormat // as QEMU calls it
	}
	if x := h.compatible &^ compatKnown; x != 0 {
		d["unknown_compatible"] = h.names.list(featureCompatible, x)
	}
	if x := h.autoclear &^ autoclearKnown; x != 0 {
		d["unknown_autoclear"] = h.names.list(featureAutoclear, x)
	}
	if len(h.unknownExtensions) > 0 {
		d["unknown_extensions"] = fmt.Sprintf("%#x", h.unknownExtensions)
	}
	return d
}

// listed bounds what Info lists: 65536 snapshots of one long name make
// megabytes out of a small file.
const listed = 1000
