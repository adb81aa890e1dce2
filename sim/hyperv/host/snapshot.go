package host

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/cim"
)

// createSnapshot is VSSS.CreateSnapshot.
func (h *Host) createSnapshot(args results) (results, uint32) {
	v := h.vmOf(args["AffectedSystem"])
	if v == nil || v.planned {
		return nil, codeParameter
	}
	var asked Request
	ignore := false
	if text := args["SnapshotSettings"].String(); text != "" {
		s, err := cim.ParseEmbedded(cim.Virtualization, text)
		switch {
		case errors.Is(err, cim.ErrType):
			return nil, codeFailed
		case err != nil || !s.Class.Is("Msvm_VirtualSystemSnapshotSettingData"):
			return nil, codeParameter
		}
		ignore = s.Get("IgnoreNonSnapshottableDisks").String() == "true"
		asked.ConsistencyLevel, asked.GuestBackupType = s.Get("ConsistencyLevel").Uint(), s.Get("GuestBackupType").Uint()
	}
	asked.SnapshotType = args["SnapshotType"].Uint()
	kind := map[uint64]string{2: userMade, 32768: recovery}[asked.SnapshotType]
	if kind == "" || asked.ConsistencyLevel > 2 || asked.GuestBackupType > 2 {
		return nil, codeParameter
	}
	v.requests = append(v.requests, asked)
	level := asked.ConsistencyLevel
	return h.start(v, "CreateSnapshot", func() ([]affected, error) {
		if level == 1 && v.state == stateRunning && !v.freezes() {
			return nil, fmt.Errorf("'%s' could not initiate a checkpoint operation: the guest's backup service is not there (0x80070015)", v.name)
		}
		if left := v.config.withoutCheckpoints(); left != "" && !ignore {
			return nil, fmt.Errorf("'%s' could not initiate a checkpoint operation: no checkpoint can be taken of '%s'", v.name, left)
		}
		if h.trouble.Downgrade && level == 1 {
			level = 2
		}
		s, err := h.snapshot(v, kind, level)
		if err != nil {
			return nil, err
		}
		return []affected{{v.ref(), effectUnknown}, {settingsRef(s.config.id), effectCreated}}, nil
	})
}

// snapshot freezes all disks of v.
func (h *Host) snapshot(v *vm, kind string, level uint64) (*snapshot, error) {
	s := &snapshot{config: v.config.copy(newGUID()), kind: kind, level: level, frozen: map[string]*layer{}, rct: map[string]string{}, changes: map[string]map[string]*track{}}
	now := h.o.Now()
	s.config.vssd.Put("VirtualSystemType", cim.Text(kind)).Put("ConfigurationID", cim.Text(s.config.id)).Put("CreationTime", h.stamp()).
		Put("ElementName", cim.Text(fmt.Sprintf("%s - Backup - (%s)", v.name, now.Format("1/2/2006 - 3:04:05 PM")))).
		Put("ConfigurationFile", cim.Text(`Snapshots\`+s.config.id+extDefinition)).Put("GuestStateFile", cim.Text(`Snapshots\`+s.config.id+extGuest))
	if kind == userMade {
		s.config.vssd.Put("IsSaved", cim.Bool(v.state == stateSaved || v.state == stateRunning && v.config.vssd.Get("UserSnapshotType").Uint() == userSnapshotTest))
		s.config.vssd.Put("ElementName", cim.Text(fmt.Sprintf("%s - (%s)", v.name, now.Format("1/2/2006 - 3:04:05 PM"))))
	}
	for _, d := range v.list {
		s.frozen[d.id] = d.top()
		s.changes[d.id] = map[string]*track{}
		for id, t := range d.tracks {
			s.changes[d.id][id] = t.clone()
		}
		if err := h.freeze(d); err != nil {
			return nil, err
		}
		if kind == recovery && v.tracks() && !isVHD(d.layers[0].path) {
			id := fmt.Sprintf("rctX:%s:%08X", strings.ToLower(strings.ReplaceAll(newGUID(), "-", ":")), len(v.points))
			s.rct[d.id] = id
			d.tracks[id] = &track{bits: make([]uint64, d.bytes/h.o.Granule/64+1)}
			for _, ext := range []string{".rct", ".mrt"} {
				if err := os.WriteFile(h.local(d.layers[0].path+ext), make([]byte, 4096), 0o644); err != nil {
					return nil, err
				}
			}
		}
	}
	v.snapshots = append(v.snapshots, s)
	if kind == userMade {
		v.config.vssd.Put("Parent", cim.Text(s.config.vssd.Ref().Path()))
	}
	v.remember("Microsoft:" + s.config.id)
	v.placeAll()
	return s, h.writeAll(v)
}

// writeAll writes the definitions of a VM and its checkpoints.
func (h *Host) writeAll(v *vm) error {
	err := h.writeFiles(v.config)
	for _, s := range v.snapshots {
		err = errors.Join(err, h.writeFiles(s.config))
	}
	return err
}

// drop takes a checkpoint away and merges what only it held apart.
func (h *Host) drop(v *vm, s *snapshot) error {
	if !slices.Contains(v.snapshots, s) {
		return errors.New("the checkpoint is gone")
	}
	v.forget(s)
	for _, d := range v.list {
		l := s.frozen[d.id]
		n := slices.Index(d.layers, l)
		if n < 0 || n+1 >= len(d.layers) {
			continue
		}
		gone := d.layers[n+1]
		if err := h.merge(d, n); err != nil {
			return fmt.Errorf("merging %s: %w", gone.path, err)
		}
		for _, other := range v.snapshots {
			if other.frozen[d.id] == gone {
				other.frozen[d.id] = l
			}
		}
	}
	v.placeAll()
	return errors.Join(h.writeAll(v), h.removeFiles(s.config))
}

// forget takes a checkpoint out of the tree: what was based on it is based on
// what it was based on.
func (v *vm) forget(s *snapshot) {
	v.snapshots = slices.DeleteFunc(v.snapshots, func(t *snapshot) bool { return t == s })
	gone := s.config.vssd.Ref()
	for _, i := range append([]*cim.Instance{v.config.vssd}, v.snapshotSettings()...) {
		if ref, err := cim.ParsePath(i.Get("Parent").String(), cim.Virtualization); err == nil && ref.Equal(gone) {
			i.Put("Parent", s.config.vssd.Get("Parent"))
		}
	}
}

func (v *vm) snapshotSettings() (list []*cim.Instance) {
	for _, s := range v.snapshots {
		list = append(list, s.config.vssd)
	}
	return list
}

// destroySnapshot is VSSS.DestroySnapshot.
func (h *Host) destroySnapshot(args results) (results, uint32) {
	v, s := h.snapshotOf(args["AffectedSnapshot"])
	if s == nil {
		return nil, codeParameter
	}
	return h.start(v, "DestroySnapshot", func() ([]affected, error) {
		if v.planned {
			v.forget(s)
			return nil, nil
		}
		for _, d := range v.list {
			delete(d.tracks, s.rct[d.id])
		}
		return []affected{{v.ref(), effectUnknown}}, h.drop(v, s)
	})
}

// convert is VSSS.ConvertToReferencePoint.
func (h *Host) convert(args results) (results, uint32) {
	v, s := h.snapshotOf(args["AffectedSnapshot"])
	if s == nil {
		return nil, codeParameter
	}
	if s.kind != recovery {
		return nil, codeUnsupported
	}
	return h.start(v, "ConvertToReferencePoint", func() ([]affected, error) {
		p := &point{id: "Microsoft:" + v.id + `\` + newGUID(), level: s.level}
		for _, d := range v.list {
			if id := s.rct[d.id]; id != "" {
				p.disks = append(p.disks, "Microsoft:"+v.id+`\`+d.id)
				p.rct = append(p.rct, id)
				p.of = append(p.of, d)
			}
		}
		if h.trouble.UnequalArrays && len(p.rct) > 0 {
			p.rct = p.rct[:len(p.rct)-1]
		}
		v.sameMoment(p.id, "Microsoft:"+s.config.id)
		if err := h.drop(v, s); err != nil {
			return nil, err
		}
		v.points = append(v.points, p)
		return []affected{{v.ref(), effectUnknown}, {p.ref(), effectCreated}}, nil
	})
}

// destroyPoint is RefPointService.DestroyReferencePoint.
func (h *Host) destroyPoint(args results) (results, uint32) {
	ref := args["AffectedReferencePoint"].Ref
	for _, v := range h.vms {
		for _, p := range v.points {
			if ref == nil || !ref.Equal(p.ref()) {
				continue
			}
			return h.start(v, "DestroyReferencePoint", func() ([]affected, error) {
				v.points = slices.DeleteFunc(v.points, func(q *point) bool { return q == p })
				for i, d := range p.of {
					if i < len(p.rct) {
						delete(d.tracks, p.rct[i])
					}
				}
				return nil, nil
			})
		}
	}
	return nil, codeParameter
}

func (p *point) ref() cim.Ref {
	return cim.Ref{Namespace: cim.Virtualization, Class: "Msvm_VirtualSystemReferencePoint", Keys: map[string]string{"InstanceID": p.id}}
}

func (h *Host) vmOf(v cim.Value) *vm {
	for _, m := range h.vms {
		if v.Ref != nil && v.Ref.Equal(m.ref()) {
			return m
		}
	}
	return nil
}

func (h *Host) snapshotOf(v cim.Value) (*vm, *snapshot) {
	if v.Ref == nil || !strings.EqualFold(v.Ref.Class, "Msvm_VirtualSystemSettingData") {
		return nil, nil
	}
	m, _, s := h.configOf(v.Ref.Keys["InstanceID"])
	return m, s
}
