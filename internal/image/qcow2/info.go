package qcow2

import (
	"fmt"

	"github.com/backstay/backstay/internal/image"
)

// Info describes the image.
func (img *Image) Info() image.Info {
	h := &img.header
	info := image.Info{
		Format:       image.Qcow2,
		Version:      int(h.version),
		VirtualBytes: img.active.size,
		FileBytes:    img.file.Bytes(),
		BlockBytes:   h.clusterBytes(),
		SectorBytes:  512,
		Compression:  "zlib",
		Parent:       h.backing,
		Warnings:     append([]string(nil), img.warnings...),
	}
	if h.compression == compressZstd {
		info.Compression = "zstd"
	}
	if f, err := parentFormat(h.backingFormat); err == nil {
		info.ParentFormat = f
	}
	for i, s := range img.snapshots {
		if i == listed {
			info.Warnings = append(info.Warnings, fmt.Sprintf("of %d snapshots only the first %d are listed", len(img.snapshots), listed))
			break
		}
		info.Snapshots = append(info.Snapshots, s.Name)
	}
	for i, b := range img.bitmaps {
		if i == listed {
			info.Warnings = append(info.Warnings, fmt.Sprintf("of %d bitmaps only the first %d are listed", len(img.bitmaps), listed))
			break
		}
		info.Bitmaps = append(info.Bitmaps, b.Name)
	}
	details := map[string]string{"refcount_bits": fmt.Sprint(h.refcountBits)}
	for key, set := range map[string]bool{
		"dirty":           h.incompatible&incompatDirty != 0,
		"corrupt":         h.incompatible&incompatCorrupt != 0,
		"extended_l2":     h.extendedL2(),
		"lazy_refcounts":  h.compatible&compatLazyRefcounts != 0,
		"raw_data_file":   h.autoclear&autoclearRawData != 0,
		"bitmaps_trusted": len(img.bitmaps) > 0 && h.autoclear&autoclearBitmaps != 0,
	} {
		if set {
			details[key] = "true"
		}
	}
	if h.dataFile != "" {
		details["data_file"] = h.dataFile
		if img.data != img.file {
			info.FileBytes += img.data.Bytes()
		}
	}
	if len(h.unknownExtensions) > 0 {
		details["unknown_extensions"] = fmt.Sprintf("%#x", h.unknownExtensions)
	}
	info.FormatDetails = details
	return info
}

// listed bounds what Info lists: 65536 snapshots of one long name make
// megabytes out of a small file.
const listed = 1000
