// Package vm says what a virtual machine, its disks and its settings are, on
// any hypervisor.
package vm

import (
	"fmt"
	"strings"
)

// A Machine describes one virtual machine as its hypervisor showed it.
type Machine struct {
	Name       string `json:"name"`
	Host       string `json:"host,omitempty"`    // as people call it
	HostID     string `json:"host_id,omitempty"` // as it calls itself, stable across renames
	UUID       string `json:"uuid,omitempty"`
	Hypervisor string `json:"hypervisor"`      // "kvm", "hyperv", "vsphere", "images"
	State      string `json:"state,omitempty"` // "running", "shut off", "paused", …
	Disks      []Disk `json:"disks"`
}

// DiskID names a disk within its machine. It stays the same from one backup to
// the next as long as it is the same disk: on KVM the target ("vda"), for
// image files the file's base name.
type DiskID string

// A Disk describes one virtual disk.
type Disk struct {
	ID        DiskID `json:"id"`
	SizeBytes int64  `json:"size_bytes"`       // what the guest sees
	Format    string `json:"format,omitempty"` // of the source: "qcow2", "raw", …
	Source    string `json:"source,omitempty"` // file, device or URL at the source
	Bus       string `json:"bus,omitempty"`    // "virtio", "scsi", …
	// Excluded says why the disk is not protected; empty for one that is.
	Excluded string `json:"excluded,omitempty"`
}

// A ConfigFile is one file of a machine's definition, kept as it was.
type ConfigFile struct {
	Name string // "domain.xml", "nvram"
	Data []byte
}

// A Grade is what the guest was told before the snapshot; the restore point
// records it. Grades are ordered: see AtLeast.
type Grade string

// The grades, lowest first.
const (
	GradeCrash       Grade = "crash"       // nothing: as after a power cut
	GradeSavedState  Grade = "saved-state" // memory was saved with the disks
	GradeFilesystem  Grade = "filesystem"  // the guest's file systems were frozen
	GradeApplication Grade = "application" // VSS writers or a configured freeze hook ran
)

var rank = map[Grade]int{GradeCrash: 1, GradeSavedState: 2, GradeFilesystem: 3, GradeApplication: 4}

// AtLeast says whether g promises no less than h does.
func (g Grade) AtLeast(h Grade) bool { return rank[g] >= rank[h] }

// Consistency is the policy word for the grade that a backup asks for.
type Consistency string

// The policies. Prefer falls back to a lower grade with a warning, the others
// fail with fault.ErrConsistency.
const (
	RequireApplication Consistency = "require-application"
	PreferApplication  Consistency = "prefer-application"
	Filesystem         Consistency = "filesystem"
	Crash              Consistency = "crash"
)

// ParseConsistency takes the policy words that the command line takes.
func ParseConsistency(s string) (Consistency, error) {
	switch c := Consistency(s); c {
	case RequireApplication, PreferApplication, Filesystem, Crash:
		return c, nil
	}
	return "", fmt.Errorf("unknown consistency %q: want %s, %s, %s or %s", s, RequireApplication, PreferApplication, Filesystem, Crash)
}

// EscapeName writes a machine's name so that "/" can separate it from a
// restore point's id: "/" becomes %2F and "%" becomes %25.
func EscapeName(name string) string {
	return strings.ReplaceAll(strings.ReplaceAll(name, "%", "%25"), "/", "%2F")
}

// UnescapeName undoes EscapeName. Other uses of "%" are left as they are.
func UnescapeName(s string) string {
	return strings.NewReplacer("%2F", "/", "%2f", "/", "%25", "%").Replace(s)
}
