package hyperv

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// A changeID says since when the host tracks the writes to a disk. It is kept
// with restore points: fields may be added, never given another meaning.
//
// The restore point is committed before the host makes the reference point, so
// it names the run, and the journal knows which reference point that made.
type changeID struct {
	Version int    `json:"v"` // 1
	VM      string `json:"vm"`
	Run     string `json:"run"`
	Disk    string `json:"disk"` // the device of its setting
	// Identity is the virtual disk's own, whatever file it is in.
	Identity string `json:"identity"`
	// Path is of the VM's own file just before the checkpoint. That must still be among those that the disk is
	// made of: one to which a user's checkpoint was applied goes on in another
	// file from an older state, and what was written before does not show.
	Path string `json:"path"`
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
	if c.Version != 1 || c.Run == "" {
		return changeID{}, fmt.Errorf("change id of version %d", c.Version)
	}
	return c, nil
}

// Reasons why a disk is not read incrementally; restore points record them.
const (
	reasonFirst      = "first backup"
	reasonNewDisk    = "new disk"
	reasonNoTracking = "the previous restore point has no change id"
	reasonVHD        = "changes of VHD disks are not tracked: everything is read and compared"
	reasonOldVM      = "changes of VMs of a configuration version below 6.2 are not tracked: everything is read and compared"
	reasonSaved      = "a checkpoint with saved state has no change tracking: everything is read and compared"
	lost             = "change tracking was lost: "
)

// A decision is how one disk is read.
type decision struct {
	mode   point.Mode
	reason string
	since  string // the RCT id that Changed counts from; only for point.Incremental
	was    int64  // bytes of the disk then
	track  bool   // the disk can be tracked from now on
}

// diskFacts are what a decision rests on.
type diskFacts struct {
	id       vm.DiskID
	device   string
	format   string
	size     int64
	identity string   // of the virtual disk
	chain    []string // its frozen file and that one's parents
}

// vmFacts are of all disks of the VM.
type vmFacts struct {
	guid  string
	node  string // where it is now, "" for not known
	old   bool   // its configuration version has no tracking
	saved bool   // the checkpoint is none that tracking goes with
	// bases are our reference points of this repository, by the run that made
	// them.
	bases map[string]reference
}

// A reference is a reference point as the host shows it.
type reference struct {
	id       string
	node     string // where the VM was then, "" for not known
	moved    string // from where it had moved since the checkpoint, "" for not at all
	missing  bool   // the host has it no more
	disks    []string
	tracking []string // RCT ids, of the disks in the same order
}

// rct is the id of the tracking of a device, "" for none.
func (r reference) rct(device string) string {
	for i, id := range r.disks {
		if i < len(r.tracking) && deviceOf(id) == device {
			return r.tracking[i]
		}
	}
	return ""
}

// decide chooses how to read a disk. Every "no" has its reason, and a doubt is
// a "no".
func decide(f diskFacts, of vmFacts, prev map[vm.DiskID]hypervisor.PreviousDisk) decision {
	d := decision{mode: point.Full, track: f.format == "vhdx" && !of.old && !of.saved}
	was, known := prev[f.id]
	switch {
	case len(prev) == 0:
		d.reason = reasonFirst
		return d
	case !known:
		d.reason = reasonNewDisk
		return d
	case f.format != "vhdx":
		d.mode, d.reason = point.Compared, reasonVHD
		return d
	case of.old:
		d.mode, d.reason = point.Compared, reasonOldVM
		return d
	case of.saved:
		d.mode, d.reason = point.Compared, reasonSaved
		return d
	case was.ChangeID == "":
		d.reason = reasonNoTracking
		return d
	}
	c, err := parseChangeID(was.ChangeID)
	base, have := of.bases[c.Run]
	switch {
	case err != nil:
		d.reason = lost + "the previous point's change id can't be read"
	case !strings.EqualFold(c.VM, of.guid):
		d.reason = lost + "the previous point is of another VM of that name"
	case c.Identity == "" || f.identity == "" || c.Identity != f.identity:
		d.reason = lost + "the disk was replaced, it was in " + c.Path
	case c.Disk != f.device:
		d.reason = lost + "the disk hangs on another device now"
	case f.size != was.SizeBytes:
		d.reason = fmt.Sprintf("%sthe disk was resized from %d to %d bytes", lost, was.SizeBytes, f.size)
	case !slices.ContainsFunc(f.chain, func(name string) bool { return sameFile(name, c.Path) }):
		d.reason = lost + "it is no longer made of " + c.Path + ": a checkpoint was applied or deleted, or the disk was moved"
	case !have:
		d.reason = lost + "no reference point of that restore point is known here"
	case base.missing:
		d.reason = lost + "the host no longer has the reference point"
	case base.moved != "":
		d.reason = fmt.Sprintf("%sthe VM moved from %s to %s while the previous restore point was made", lost, base.moved, base.node)
	case base.node != "" && of.node != "" && !strings.EqualFold(base.node, of.node):
		// Nobody has recorded whether tracking goes on there without a gap.
		d.reason = fmt.Sprintf("%sthe VM moved from %s to %s since then", lost, base.node, of.node)
	case len(base.disks) != len(base.tracking):
		d.reason = fmt.Sprintf("%sthe reference point names %d disks and %d change tracking ids", lost, len(base.disks), len(base.tracking))
	case base.rct(f.device) == "":
		d.reason = lost + "the reference point does not have the disk"
	default:
		d.mode, d.since, d.was = point.Incremental, base.rct(f.device), was.SizeBytes
	}
	return d
}
