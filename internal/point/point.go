// Package point says what one backup of one VM recorded: the RestorePoint and
// its disks. It holds no data and does no I/O.
package point

import (
	"fmt"
	"strings"
	"time"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/vm"
)

// ID names a restore point within its VM: the UTC time of its snapshot and
// four random bytes, "20261122T031500Z-7f3a9c01", so that IDs sort by time.
type ID string

// ManifestID names the manifest of one disk of one restore point.
type ManifestID string

// A RestorePoint is one VM as it was at one moment. It restores on its own,
// however little was read to make it.
type RestorePoint struct {
	ID      ID         `json:"id"`
	VM      string     `json:"vm"`     // unique in the repository
	Time    time.Time  `json:"time"`   // of the snapshot
	Source  string     `json:"source"` // URL or files, never with a secret in it
	Machine vm.Machine `json:"machine"`
	Grade   vm.Grade   `json:"grade"`
	Disks   []Disk     `json:"disks"`
	// Unprotected are the disks that this point does not hold, each with the
	// reason in Disk.Excluded.
	Unprotected []vm.Disk `json:"unprotected,omitempty"`
	// Config are the files of the machine's definition, by name; their
	// contents are chunks of the repository.
	Config map[string]Blob `json:"config,omitempty"`
	// FrozenFor is how long the guest stood still; 0 where it was not frozen.
	FrozenFor time.Duration `json:"frozen_for_ns,omitempty"`
	Warnings  []string      `json:"warnings,omitempty"`
	// ImmutableUntil is how long the repository promised to keep the point, nil
	// for no promise.
	ImmutableUntil *time.Time `json:"immutable_until,omitempty"`
	Stats          Stats      `json:"stats"`
	// Suspect is set when a later audit found that change tracking had lied
	// and this point may rest on it; empty otherwise. It is kept beside the
	// record, which is never rewritten.
	Suspect string `json:"suspect,omitempty"`
	// Protected is set while somebody wants the point kept whatever a keep rule
	// says, and ProtectedWhy is his reason, if he gave one. Both are kept beside
	// the record, too.
	Protected    bool   `json:"protected,omitempty"`
	ProtectedWhy string `json:"protected_why,omitempty"`
}

// A Blob is a small file kept in chunks.
type Blob struct {
	SizeBytes int64      `json:"size_bytes"`
	Chunks    []chunk.ID `json:"chunks"`
}

// A Disk is one disk of a restore point.
type Disk struct {
	vm.Disk
	Manifest ManifestID `json:"manifest"`
	Mode     Mode       `json:"mode"`
	Reason   string     `json:"reason,omitempty"` // why Mode is Full: "first backup", "change tracking was lost: …"
	// ChangeID is the driver's opaque token for "changed since this point".
	ChangeID string `json:"change_id,omitempty"`
	Stats    Stats  `json:"stats"`
}

// Mode says how much of a disk was read, never how it is stored.
type Mode string

// The modes.
const (
	Full        Mode = "full"        // everything that the source called allocated
	Incremental Mode = "incremental" // what change tracking named
	Compared    Mode = "compared"    // everything, compared by hash with the previous point
)

// Stats counts bytes; a restore point's are the sums over its disks.
type Stats struct {
	ReadBytes    int64         `json:"read_bytes"`              // from the source, the audit included
	ChangedBytes int64         `json:"changed_bytes,omitempty"` // what change tracking named
	AuditBytes   int64         `json:"audit_bytes,omitempty"`   // of ReadBytes, to check change tracking
	RefillBytes  int64         `json:"refill_bytes,omitempty"`  // of ReadBytes, because the previous point could not be read
	NewBytes     int64         `json:"new_bytes"`               // chunks that the repository did not have, before compression
	StoredBytes  int64         `json:"stored_bytes"`            // what those take in the repository
	Duration     time.Duration `json:"duration_ns"`
}

// Add sums the counts of t into s; Duration becomes the longer of the two.
func (s *Stats) Add(t Stats) {
	s.ReadBytes += t.ReadBytes
	s.ChangedBytes += t.ChangedBytes
	s.AuditBytes += t.AuditBytes
	s.RefillBytes += t.RefillBytes
	s.NewBytes += t.NewBytes
	s.StoredBytes += t.StoredBytes
	s.Duration = max(s.Duration, t.Duration)
}

// SizeBytes is the sum of the disks' virtual sizes.
func (p *RestorePoint) SizeBytes() int64 {
	var n int64
	for _, d := range p.Disks {
		n += d.SizeBytes
	}
	return n
}

// Ref is how people name p: "web01/20261122T031500Z-7f3a9c01".
func (p *RestorePoint) Ref() string { return vm.EscapeName(p.VM) + "/" + string(p.ID) }

// NewID makes the ID of a point taken at t; random is four random bytes.
func NewID(t time.Time, random [4]byte) ID {
	return ID(fmt.Sprintf("%s-%x", t.UTC().Format("20060102T150405Z"), random))
}

// ParseRef splits "VM/ID" or "VM"; id is empty for the newest point of a VM.
func ParseRef(ref string) (name string, id ID, err error) {
	name, rest, found := strings.Cut(ref, "/")
	if name == "" || found && (rest == "" || strings.Contains(rest, "/")) {
		return "", "", fmt.Errorf("%q is no restore point: want VM or VM/ID", ref)
	}
	return vm.UnescapeName(name), ID(rest), nil
}
