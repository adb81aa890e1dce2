package kvm

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// A changeID says since when libvirt tracks the writes to a disk. It is kept
// with restore points: fields may be added, never given another meaning.
type changeID struct {
	Version    int    `json:"v"` // 1
	Domain     string `json:"domain"`
	Disk       string `json:"disk"`
	Checkpoint string `json:"checkpoint"` // also the name of the bitmap in the image

	// Files are the disk's layers, top first: a target's name may come to stand
	// for another disk, whose bitmap of that checkpoint says nothing of this one.
	Files []string `json:"files,omitempty"`
}

func (c changeID) String() string {
	b, _ := json.Marshal(c) // strings and a number
	return string(b)
}

func parseChangeID(s string) (changeID, error) {
	var c changeID
	if err := json.Unmarshal([]byte(s), &c); err != nil {
		return changeID{}, err
	}
	if c.Version != 1 || c.Checkpoint == "" {
		return changeID{}, fmt.Errorf("change id of version %d", c.Version)
	}
	return c, nil
}

// Reasons why a disk is not read incrementally; restore points record them.
const (
	reasonFirst      = "first backup"
	reasonNewDisk    = "new disk"
	reasonNoTracking = "the previous restore point has no checkpoint"
	reasonRaw        = "raw disks keep no bitmaps: everything is read and compared"
	reasonOldQcow2   = "qcow2 version 2 keeps no bitmaps: everything is read and compared"
	reasonReadOnly   = "a read-only disk keeps no bitmaps: everything is read and compared"
	lost             = "change tracking was lost: "
	reasonSpread     = lost + "the bitmap is spread over a chain of images, which can be read only while the VM runs"
)

// tracking is what is known of a bitmap on a disk.
type tracking int

const (
	bitmapMissing tracking = iota
	bitmapHealthy
	bitmapInconsistent // its QEMU was killed, or the host died
	bitmapDisabled     // it does not record, or would not survive a restart
	bitmapSpread       // in several layers, which nobody merges while the VM is off
)

// A decision is how one disk is read.
type decision struct {
	mode   point.Mode
	reason string
	base   string // checkpoint that Changed counts from; only for point.Incremental
	grown  int64  // bytes of the previous point's disk, if it was smaller; else its size
	track  bool   // the disk can hold the bitmap of a checkpoint
}

// diskFacts are what a decision rests on.
type diskFacts struct {
	id       vm.DiskID
	files    []string // its layers, top first
	size     int64
	format   string
	oldQcow2 bool
	readOnly bool
	bitmap   tracking // of the checkpoint that the previous point names
}

// decide chooses how to read a disk. Every "no" has its reason, and a doubt is
// a "no". checkpoints are those that libvirt has, prefix is our repository's.
func decide(f diskFacts, domain, prefix string, prev map[vm.DiskID]hypervisor.PreviousDisk, checkpoints map[string]bool) decision {
	d := decision{mode: point.Full, track: true}
	was, known := prev[f.id]
	noBitmaps := ""
	switch {
	case f.readOnly:
		noBitmaps = reasonReadOnly
	case f.format != "qcow2":
		noBitmaps = reasonRaw
		if f.format != "raw" {
			noBitmaps = f.format + " disks keep no bitmaps: everything is read and compared"
		}
	case f.oldQcow2:
		noBitmaps = reasonOldQcow2
	}
	d.track = noBitmaps == ""
	switch {
	case len(prev) == 0:
		d.reason = reasonFirst
		return d
	case !known:
		d.reason = reasonNewDisk
		return d
	case !d.track:
		d.mode, d.reason = point.Compared, noBitmaps
		return d
	case was.ChangeID == "":
		d.reason = reasonNoTracking
		return d
	}
	c, err := parseChangeID(was.ChangeID)
	switch {
	case err != nil:
		d.reason = lost + "the previous point's change id can't be read"
	case c.Domain != domain:
		d.reason = lost + "the previous point is of another VM of that name"
	case c.Disk != string(f.id):
		d.reason = lost + "the previous point is of disk " + c.Disk
	case len(c.Files) == 0:
		d.reason = lost + "the previous point does not say in which files the disk was"
	case !sameDisk(c.Files, f.files):
		d.reason = lost + "the disk was replaced, it was in " + c.Files[0]
	case len(c.Checkpoint) <= len(prefix) || c.Checkpoint[:len(prefix)] != prefix:
		d.reason = lost + "the previous checkpoint is another repository's"
	case f.size < was.SizeBytes:
		d.reason = fmt.Sprintf("%sthe disk shrank from %d to %d bytes", lost, was.SizeBytes, f.size)
	case !checkpoints[c.Checkpoint]:
		d.reason = lost + "libvirt no longer has the checkpoint"
	case f.bitmap == bitmapMissing:
		d.reason = lost + "the bitmap is missing from the disk"
	case f.bitmap == bitmapInconsistent:
		d.reason = lost + "the bitmap is inconsistent, because QEMU or the host went down"
	case f.bitmap == bitmapDisabled:
		d.reason = lost + "the bitmap was not recording"
	case f.bitmap == bitmapSpread:
		d.reason = reasonSpread
	default:
		d.mode, d.base, d.grown = point.Incremental, c.Checkpoint, was.SizeBytes
	}
	return d
}

// sameDisk says whether two chains of files, top first, can be one disk at two
// times: a snapshot puts a layer on top of the old one, and a commit makes a
// lower one the top. Two disks on one base have neither.
func sameDisk(was, now []string) bool {
	return len(was) > 0 && len(now) > 0 && (slices.Contains(was, now[0]) || slices.Contains(now, was[0]))
}

// baseOf is the checkpoint that a previous disk names, "" for none.
func baseOf(p hypervisor.PreviousDisk) string {
	c, err := parseChangeID(p.ChangeID)
	if err != nil {
		return ""
	}
	return c.Checkpoint
}
