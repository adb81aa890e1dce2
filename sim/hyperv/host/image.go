package host

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/sim/hyperv/cim"
)

// changes is IMS.GetVirtualDiskChanges: what was written between an RCT id and
// the moment that the file shows.
func (h *Host) changes(args results) (results, uint32) {
	if code, ok := h.trouble.Refuse["GetVirtualDiskChanges"]; ok {
		delete(h.trouble.Refuse, "GetVirtualDiskChanges")
		return nil, code
	}
	d, tracks := h.tracksOf(args["Path"].String())
	if d == nil {
		return nil, codeNoFile
	}
	within := extent.Extent{Off: int64(args["ByteOffset"].Uint()), Len: int64(args["ByteLength"].Uint())}
	t := tracks[args["LimitId"].String()]
	if t == nil || within.Off < 0 || within.Len <= 0 || within.Off > d.bytes || within.Len > d.bytes-within.Off {
		return nil, codeParameter
	}
	if h.trouble.ShortAnswers > 0 {
		within.Len = min(within.Len, h.trouble.ShortAnswers)
	}
	list, processed := t.ranges(within, h.o.Granule, d.bytes, 1<<20)
	if h.trouble.EmptyProgress {
		list, processed = nil, 0
	}
	offsets, lengths := cim.List(), cim.List()
	for _, e := range list {
		offsets.Items = append(offsets.Items, fmt.Sprint(e.Off))
		lengths.Items = append(lengths.Items, fmt.Sprint(e.Len))
	}
	return results{"ProcessedByteLength": cim.Number(processed), "ChangedByteOffsets": offsets, "ChangedByteLengths": lengths}, codeDone
}

// tracksOf is the disk that has a file, and what is tracked up to what the file
// shows: up to its checkpoint, or up to now.
func (h *Host) tracksOf(path string) (*disk, map[string]*track) {
	for _, v := range h.vms {
		for _, d := range v.list {
			for _, l := range d.layers {
				if !strings.EqualFold(l.path, path) {
					continue
				}
				for i := len(v.snapshots) - 1; i >= 0; i-- {
					if v.snapshots[i].frozen[d.id] == l {
						return d, v.snapshots[i].changes[d.id]
					}
				}
				return d, d.tracks
			}
		}
	}
	return nil, nil
}

// diskFormat is what Msvm_VirtualHardDiskSettingData calls VHD and VHDX.
var diskFormat = map[bool]string{true: "2", false: "3"}

// diskSettings is IMS.GetVirtualHardDiskSettingData.
func (h *Host) diskSettings(args results) (results, uint32) {
	path := args["Path"].String()
	img, err := openLayer(h.local(path))
	if err != nil {
		return nil, codeNoFile
	}
	defer img.Close()
	info := img.Info()
	kind := map[string]string{"fixed": "2", "differencing": "4"}[info.Variant]
	if kind == "" {
		kind = "3"
	}
	i := cim.New(cim.Virtualization, "Msvm_VirtualHardDiskSettingData").Put("Path", cim.Text(path)).Put("Type", cim.Text(kind)).Put("Format", cim.Text(diskFormat[isVHD(path)])).
		Put("MaxInternalSize", cim.Number(info.VirtualBytes)).Put("BlockSize", cim.Number(info.BlockBytes)).Put("LogicalSectorSize", cim.Number(info.SectorBytes)).Put("PhysicalSectorSize", cim.Text("4096")).
		Put("VirtualDiskId", cim.Text(strings.Trim(strings.ToUpper(cmp.Or(info.FormatDetails["disk identity"], info.Identity)), "{}")))
	if parent := h.parentOf(path); parent != "" {
		i.Put("ParentPath", cim.Text(parent))
	}
	return results{"SettingData": cim.Text(i.Embedded())}, codeDone
}

func (h *Host) parentOf(path string) string {
	for _, v := range h.vms {
		for _, d := range v.list {
			for n, l := range d.layers {
				if n > 0 && strings.EqualFold(l.path, path) {
					return d.layers[n-1].path
				}
			}
		}
	}
	return ""
}

// diskState is IMS.GetVirtualHardDiskState.
func (h *Host) diskState(args results) (results, uint32) {
	path := args["Path"].String()
	info, err := os.Stat(h.local(path))
	if err != nil || info.IsDir() {
		return nil, codeNoFile
	}
	d, _ := h.tracksOf(path)
	i := cim.New(cim.Virtualization, "Msvm_VirtualHardDiskState").Put("FileSize", cim.Number(info.Size())).Put("InUse", cim.Bool(d != nil)).Put("Timestamp", h.stamp())
	return results{"State": cim.Text(i.Embedded())}, codeDone
}

// newDisk is IMS.CreateVirtualHardDisk.
func (h *Host) newDisk(args results) (results, uint32) {
	s, err := cim.ParseEmbedded(cim.Virtualization, args["VirtualDiskSettingData"].String())
	if err != nil || !s.Class.Is("Msvm_VirtualHardDiskSettingData") || s.Get("Format").String() != diskFormat[isVHD(s.Get("Path").String())] || s.Get("Type").Uint() < 2 || s.Get("Type").Uint() > 3 {
		return nil, codeParameter
	}
	path := s.Get("Path").String()
	return h.start(nil, "CreateVirtualHardDisk", func() ([]affected, error) {
		return nil, h.createDisk(path, int64(s.Get("MaxInternalSize").Uint()), s.Get("Type").Uint() == 2, int(s.Get("LogicalSectorSize").Uint()))
	})
}

// resize is IMS.ResizeVirtualHardDisk of a VHDX without checkpoints, which may
// be in use. It grows, and shrinks never.
func (h *Host) resize(args results) (results, uint32) {
	path, bytes := args["Path"].String(), int64(args["MaxInternalSize"].Uint())
	if !h.exists(path) {
		return nil, codeNoFile
	}
	var v *vm
	var d *disk
	for _, m := range h.vms {
		for _, candidate := range m.list {
			if m.holds(path) && strings.EqualFold(candidate.top().path, path) {
				v, d = m, candidate
			}
		}
		if d == nil && m.holds(path) || d != nil && len(v.snapshots) > 0 {
			return nil, codeState // a parent, or a disk of which there are checkpoints
		}
	}
	return h.start(v, "ResizeVirtualHardDisk", func() ([]affected, error) {
		if d != nil {
			if err := d.top().file.resize(bytes); err != nil {
				return nil, err
			}
			d.bytes = bytes
			for _, t := range d.tracks {
				t.bits = append(t.bits, make([]uint64, bytes/h.o.Granule/64+1-int64(len(t.bits)))...)
			}
			return nil, nil
		}
		f, err := openLive(h.local(path))
		if err != nil {
			return nil, err
		}
		return nil, errors.Join(f.resize(bytes), f.close())
	})
}

// createSet makes the two files of a VHD set.
func (h *Host) createSet(path string, bytes int64) error {
	if err := h.createDisk(strings.TrimSuffix(path, ".vhds")+"_"+newGUID()+".avhdx", bytes, false, 0); err != nil {
		return err
	}
	return os.WriteFile(h.local(path), []byte("simulated VHD set\n"), 0o644)
}
