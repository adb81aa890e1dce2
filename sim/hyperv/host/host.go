// Package host is the state of a simulated Hyper-V host: VMs with real VHDX
// files, guests that write to them, checkpoints, reference points and jobs, as
// instances of its WMI classes.
package host

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// Options say what kind of host it is. Zero values choose the usual.
type Options struct {
	// Dir holds the host's volumes: C:\VMs\a.vhdx is C/VMs/a.vhdx there.
	Dir string
	// Shared, where set, holds C:\ClusterStorage, and is the same for all nodes
	// of a cluster.
	Shared      string
	Name        string        // "HV01"
	Granule     int64         // of change tracking: 64 KiB
	JobTime     time.Duration // how long a job takes: 50 ms
	VolumeBytes int64         // size of C: as it is told
	FreeBytes   int64         // 0 for what is left of VolumeBytes
	Switches    []string      // names of virtual switches: "LAN"
	// DataRoot and DiskRoot are where the host puts new VMs and new disks:
	// C:\ProgramData\Microsoft\Windows\Hyper-V and
	// C:\Users\Public\Documents\Hyper-V\Virtual Hard Disks.
	DataRoot, DiskRoot string
	Now                func() time.Time
}

// A Host is safe for concurrent use.
type Host struct {
	o Options

	mu       sync.Mutex
	vms      []*vm
	switches []netswitch
	jobs     []*job
	trouble  Trouble
	running  sync.WaitGroup
	closed   bool
	cluster  *Cluster // nil if it is a node of none; not changed once it answers
}

// Trouble is what goes wrong on the host, by choice.
type Trouble struct {
	// FailJob fails the next job that such a method starts, with this text in
	// its Msvm_Error.
	FailJob map[string]string
	// Refuse answers the next call of a method with this code.
	Refuse map[string]uint32
	// UnequalArrays leaves the last id out of reference points' arrays.
	UnequalArrays bool
	// ShortAnswers makes GetVirtualDiskChanges process at most so many bytes.
	ShortAnswers int64
	// EmptyProgress makes it process nothing.
	EmptyProgress bool
	// NoAffected leaves jobs' affected elements out.
	NoAffected bool
	// Downgrade gives crash consistency to who asked for application.
	Downgrade bool
	// KeepAddresses takes new MAC addresses and leaves the old ones.
	KeepAddresses bool
	// KeepIdentity imports a definition under the GUID that it has, although a
	// new one is asked for, and although a VM has it.
	KeepIdentity bool
	// SlowJobs takes so much longer for every job.
	SlowJobs time.Duration
}

// New makes a host without VMs.
func New(o Options) (*Host, error) {
	if o.Name == "" {
		o.Name = "HV01"
	}
	if o.Granule == 0 {
		o.Granule = 64 << 10
	}
	if o.JobTime == 0 {
		o.JobTime = 50 * time.Millisecond
	}
	if o.VolumeBytes == 0 {
		o.VolumeBytes = 1 << 40
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if len(o.Switches) == 0 {
		o.Switches = []string{"LAN"}
	}
	if o.DataRoot == "" {
		o.DataRoot = `C:\ProgramData\Microsoft\Windows\Hyper-V`
	}
	if o.DiskRoot == "" {
		o.DiskRoot = `C:\Users\Public\Documents\Hyper-V\Virtual Hard Disks`
	}
	h := &Host{o: o}
	for _, name := range o.Switches {
		h.switches = append(h.switches, netswitch{id: newGUID(), name: name})
	}
	if err := os.MkdirAll(filepath.Join(o.Dir, "C"), 0o755); err != nil {
		return nil, err
	}
	for _, folder := range []string{o.DataRoot, o.DiskRoot} {
		if err := os.MkdirAll(h.local(folder), 0o755); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// Close waits for jobs and closes the disks' files.
func (h *Host) Close() error {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.running.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	var err error
	for _, v := range h.vms {
		for _, d := range v.disks() {
			if e := h.detach(d); e != nil {
				err = e
			}
		}
	}
	return err
}

// SetTrouble changes what goes wrong.
func (h *Host) SetTrouble(change func(*Trouble)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change(&h.trouble)
}

// local is where the host's file path lies here. What is on shares of others is
// beneath UNC.
func (h *Host) local(path string) string {
	path = strings.TrimPrefix(path, `\\?\`)
	drive, rest, _ := strings.Cut(path, `:\`)
	for _, unc := range []string{`UNC\`, `\\`} {
		if share, ok := strings.CutPrefix(path, unc); ok {
			drive, rest = "UNC", share
		}
	}
	clean := filepath.Clean("/" + strings.ReplaceAll(rest, `\`, "/")) // nothing leads out of the volume
	if below, ok := strings.CutPrefix(clean, "/ClusterStorage/"); ok && h.o.Shared != "" && strings.EqualFold(drive, "C") {
		return filepath.Join(h.o.Shared, below)
	}
	return filepath.Join(h.o.Dir, strings.ToUpper(drive), clean)
}

// Local is where the host's file of that path lies.
func (h *Host) Local(path string) string { return h.local(path) }

// Write writes n bytes made from seed, or zeros for seed 0, as the guest.
func (h *Host) Write(name string, disk int, off, n int64, seed uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.byName(name)
	if v == nil || disk >= len(v.disks()) {
		return fmt.Errorf("no disk %d of a VM %s", disk, name)
	}
	return v.disks()[disk].write(write{off: off, n: n, seed: seed}, h.o.Granule)
}

// WriteBytes writes data as the guest.
func (h *Host) WriteBytes(name string, disk int, off int64, data []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.byName(name)
	if v == nil || disk >= len(v.disks()) {
		return fmt.Errorf("no disk %d of a VM %s", disk, name)
	}
	d := v.disks()[disk]
	return d.write(d.whole(off, data), h.o.Granule)
}

// LoseTracking forgets what was written since all the ids that there are, as
// after a crash of the host.
func (h *Host) LoseTracking() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, v := range h.vms {
		for _, d := range v.list {
			clear(d.tracks)
		}
		for _, s := range v.snapshots {
			clear(s.changes)
		}
	}
}

// Expected writes what disk has to hold at a moment: that of a checkpoint or a
// reference point by its InstanceID, which may be gone since, or now for "".
func (h *Host) Expected(name string, disk int, moment string, w io.WriterAt) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.byName(name)
	if v == nil || disk >= len(v.disks()) {
		return fmt.Errorf("no disk %d of a VM %s", disk, name)
	}
	d := v.disks()[disk]
	n := len(d.log)
	if moment != "" {
		at, ok := v.moments[moment]
		if !ok {
			return fmt.Errorf("no moment %s of %s", moment, name)
		}
		n = at[d.id]
	}
	return d.replay(n, w)
}

// Guest writes to all disks of a VM until ctx ends: so many writes a second, of
// 4 to 256 KiB, in an order that follows from seed.
func (h *Host) Guest(ctx context.Context, name string, perSecond int, seed uint64) error {
	tick := time.NewTicker(time.Second / time.Duration(perSecond))
	defer tick.Stop()
	next := func() uint64 {
		var p [8]byte
		fill(p[:], seed)
		seed += 0x9e3779b97f4a7c15
		return uint64(p[0]) | uint64(p[1])<<8 | uint64(p[2])<<16 | uint64(p[3])<<24 | uint64(p[4])<<32
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		h.mu.Lock()
		v := h.byName(name)
		var err error
		if v != nil && !h.closed && v.state == stateRunning {
			for _, d := range v.disks() {
				n := int64(4096 + next()%63*4096)
				n = min(n, d.bytes)
				off := int64(next()) % ((d.bytes-n)/4096 + 1) * 4096
				if err = d.write(write{off: off, n: n, seed: next() | 1}, h.o.Granule); err != nil {
					break
				}
			}
		}
		h.mu.Unlock()
		if err != nil {
			return fmt.Errorf("the guest of %s: %w", name, err)
		}
	}
}

func (h *Host) byName(name string) *vm {
	for _, v := range h.vms {
		if !v.planned && (v.name == name || strings.EqualFold(v.id, name)) {
			return v
		}
	}
	return nil
}

func (h *Host) stamp() cim.Value {
	return cim.Text(h.o.Now().UTC().Format("2006-01-02T15:04:05.000000Z"))
}

func newGUID() string {
	var p [16]byte
	rand.Read(p[:])
	p[6], p[8] = p[6]&0x0f|0x40, p[8]&0x3f|0x80
	return fmt.Sprintf("%X-%X-%X-%X-%X", p[0:4], p[4:6], p[6:8], p[8:10], p[10:16])
}
