package hyperv

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/winpath"
)

// plainName makes a file's name of a VM's or a disk's, which may be anything.
func plainName(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || strings.ContainsRune(`<>:"/\|?*`, r) {
			return '-'
		}
		return r
	}, s)
	s = strings.TrimRight(s, " .")
	if r := []rune(s); len(r) > 80 {
		s = strings.TrimRight(string(r[:80]), " .")
	}
	if _, err := winpath.Parse(`C:\` + s); s == "" || err != nil {
		return "vm-" + s // Windows would take it for a device
	}
	return s
}

// file is the name of a disk's file in the VM's folder.
func (m *making) file(id vm.DiskID) string {
	return plainName(m.o.Name) + "-" + plainName(string(id)) + ".vhdx"
}

// places are folders in which the VM's own may be made, the best first. why
// says what was wrong with others.
func (m *making) places(ctx context.Context) (list []winpath.Path, why []error) {
	add := func(name string, up ...string) {
		p, err := winpath.Parse(name)
		if err == nil {
			for _, base := range up {
				if strings.EqualFold(p.Base(), base) {
					p = p.Dir()
				}
			}
			_, err = m.d.files.share(p.String())
		}
		if err != nil {
			why = append(why, err)
			return
		}
		list = append(list, p)
	}
	if m.o.Folder != "" {
		add(m.o.Folder)
		return list, why
	}
	all, err := m.d.query(ctx, "SELECT * FROM Msvm_VirtualSystemManagementServiceSettingData")
	if err != nil {
		why = append(why, fmt.Errorf("where the host keeps VMs: %w", err))
	}
	for _, o := range all {
		for _, name := range []string{o.text("DefaultVirtualHardDiskPath"), o.text("DefaultExternalDataRoot")} {
			if name != "" {
				add(name)
			}
		}
	}
	// Beside where the original lay.
	for _, d := range m.o.Definition.Disks {
		if p, err := winpath.Parse(d.Source); err == nil {
			add(p.Dir().Dir().String(), "Virtual Hard Disks", m.o.Definition.Name)
			add(p.Dir().String(), "Virtual Hard Disks")
			break
		}
	}
	return list, why
}

// makeFolder makes the VM's own folder, which nobody has.
func (m *making) makeFolder(ctx context.Context) error {
	list, why := m.places(ctx)
	for _, parent := range list {
		for _, name := range []string{plainName(m.o.Name), plainName(m.o.Name) + "-" + m.id} {
			p, err := parent.Join(name)
			if err != nil {
				return err
			}
			err = m.makeOne(ctx, p.String())
			if err == nil {
				return nil
			}
			if errors.Is(err, fault.ErrExists) {
				continue
			}
			why = append(why, err)
			if ctx.Err() != nil || !errors.Is(err, fault.ErrNotFound) && !errors.Is(err, fault.ErrDenied) {
				return err
			}
			break
		}
	}
	if len(why) == 0 {
		why = append(why, fmt.Errorf("the host does not say where it keeps VMs: %w", fault.ErrNotFound))
	}
	return &FolderError{errors.Join(why...)}
}

// A FolderError says that no folder for the VM could be made.
type FolderError struct{ Err error }

func (e *FolderError) Error() string {
	return "no folder for it on the host: " + strings.ReplaceAll(e.Err.Error(), "\n", "; ")
}

// Unwrap gives the reasons.
func (e *FolderError) Unwrap() error { return e.Err }

func (m *making) makeOne(ctx context.Context, name string) error {
	// What is there is not ours, also if we die before the host says so.
	if _, err := m.d.files.list(ctx, name); err == nil {
		return fmt.Errorf("folder %s: %w", name, fault.ErrExists)
	} else if !errors.Is(err, fault.ErrNotFound) {
		return err
	}
	e := m.entry(kindFolder, name)
	if err := m.run.Note(e); err != nil {
		return err
	}
	err := m.d.files.mkdir(ctx, name)
	if errors.Is(err, fault.ErrExists) || errors.Is(err, fault.ErrNotFound) || errors.Is(err, fault.ErrDenied) {
		return errors.Join(err, m.run.Done(e.Kind, e.Name))
	}
	if err == nil {
		m.folder, m.done.Folder = name, name
	}
	return err
}
