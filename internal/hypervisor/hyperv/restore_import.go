package hyperv

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
	"github.com/backstay/backstay/internal/vm"
	"github.com/backstay/backstay/internal/wsman"
)

// kindPlanned is an imported definition that is no VM yet. Its entry's name is
// what it is called as soon as it can be.
const kindPlanned = "planned"

const (
	classPlanned = "Msvm_PlannedComputerSystem"
	typePlanned  = "Microsoft:Hyper-V:System:Planned"
	linkOff      = 3 // EnabledState of a connection
)

// errImport is the class of what is wrong with a definition, or with what the
// host makes of it, and not with our way to the host.
var errImport = errors.New("the VM's own definition does not do")

func plannedRef(guid string) wsman.Ref {
	return wsman.NewRef(classPlanned, "CreationClassName", classPlanned, "Name", strings.ToUpper(guid))
}

// definitionFile is the file of a VM's own definition among those of a restore
// point.
func definitionFile(files map[string][]byte) (string, bool) {
	found := ""
	for name := range files {
		if strings.EqualFold(filepath.Ext(name), ".vmcx") {
			if found != "" {
				return "", false
			}
			found = name
		}
	}
	return found, found != ""
}

// build makes the VM of its own definition, or of ours where the host can't use
// that one.
func (m *making) build(ctx context.Context) error {
	if _, has := definitionFile(m.o.Files); !has {
		return m.define(ctx)
	}
	warnings, notes := len(m.done.Warnings), len(m.done.Notes)
	err := m.importVM(ctx)
	if err == nil {
		m.done.How = "import"
		m.dropImported(ctx)
		return m.giveName(ctx)
	}
	if !errors.Is(err, errImport) && !hostSaid(err) || ctx.Err() != nil {
		return err
	}
	if err := m.undoImport(ctx); err != nil {
		return err
	}
	m.done.Warnings, m.done.Notes = m.done.Warnings[:warnings], m.done.Notes[:notes]
	m.warn("the host does not take the VM's own definition, so it is made of what the restore point says of it; settings that only Hyper-V has are the usual ones: %v", err)
	if err := m.define(ctx); err != nil {
		return err
	}
	m.dropImported(ctx)
	return nil
}

// undoImport takes away what came of the definition, and leaves its files.
func (m *making) undoImport(ctx context.Context) error {
	for _, e := range slices.Backward(m.run.Open()) {
		if e.Kind != kindPlanned && e.Kind != kindNewVM {
			continue
		}
		if err := m.d.undoOne(ctx, e); err != nil {
			return fmt.Errorf("take the imported definition back: %w", err)
		}
		if err := m.run.Done(e.Kind, e.Name); err != nil {
			return err
		}
	}
	return nil
}

// importVM makes the VM by importing its own definition.
func (m *making) importVM(ctx context.Context) error {
	file, err := m.sendDefinition(ctx)
	if err != nil {
		return err
	}
	return m.importFile(ctx, file)
}

// importFile does so from a definition that lies on the host.
func (m *making) importFile(ctx context.Context, file string) error {
	planned, err := m.planSystem(ctx, file)
	if err != nil {
		return err
	}
	steps := []func(context.Context) error{m.nameImported, m.placeDisks, m.placeNICs}
	for _, step := range steps {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := step(ctx); err != nil {
			return err
		}
	}
	if err := m.d.validate(ctx, planned); err != nil {
		return err
	}
	return m.realize(ctx, planned)
}

// validate asks what is wrong with an imported definition. The job tells it by
// warnings.
func (d *Driver) validate(ctx context.Context, planned wsman.Ref) error {
	_, err := d.do(ctx, familyMsvm, service(classManagement), "ValidatePlannedSystem", wsman.Arg("PlannedSystem", wsman.Of(planned)))
	return err
}

// sendDefinition writes the files of the definition to a folder of their own.
func (m *making) sendDefinition(ctx context.Context) (string, error) {
	folder := m.folder + `\import-` + m.id
	if err := m.run.Note(m.entry(kindFolder, folder)); err != nil {
		return "", err
	}
	if err := m.d.files.mkdir(ctx, folder); err != nil {
		return "", err
	}
	definition, _ := definitionFile(m.o.Files)
	for name, data := range m.o.Files {
		path := folder + `\` + plainName(name)
		if err := m.run.Note(m.entry(kindFile, path)); err != nil {
			return "", err
		}
		out, err := m.d.files.create(ctx, path)
		if err != nil {
			return "", err
		}
		_, err = out.WriteAt(data, 0)
		if err == nil {
			err = out.Sync()
		}
		if err = errors.Join(err, out.Close()); err != nil {
			return "", err
		}
	}
	return folder + `\` + plainName(definition), nil
}

// dropImported removes the files again, of which the host has made its own.
// What stays does no harm.
func (m *making) dropImported(ctx context.Context) {
	for _, e := range slices.Backward(m.run.Open()) {
		if strings.HasPrefix(e.Name, m.folder+`\import-`) && m.d.undoOne(ctx, e) == nil {
			m.run.Done(e.Kind, e.Name)
		}
	}
}

// planSystem imports the definition and finds what came of it.
func (m *making) planSystem(ctx context.Context, file string) (planned wsman.Ref, err error) {
	before, err := m.d.planned(ctx)
	if err != nil {
		return planned, err
	}
	e := m.entry(kindPlanned, m.temporary)
	e.Data[dataBefore] = strings.Join(guids(before), "\n")
	if err := m.run.Note(e); err != nil {
		return planned, err
	}
	out, job, err := m.d.start(ctx, familyMsvm, service(classManagement), "ImportSystemDefinition", importOf(file)...)
	if err != nil {
		return planned, err
	}
	if m.sys, err = m.made(ctx, e, "ImportSystemDefinition", out.ref("ImportedSystem"), job, classPlanned); err != nil {
		return planned, err
	}
	planned = m.sys.ref
	// Settings are known by their VM's GUID alone: of two that share it, the one
	// that is whole might be changed, and be destroyed in the end.
	_, live, err := m.d.systems(ctx)
	if err != nil {
		return planned, err
	}
	if i := slices.IndexFunc(live, func(s system) bool { return s.guid == m.sys.guid }); i >= 0 {
		return planned, fmt.Errorf("%w: what the host made of it has the identity of VM %q", errImport, live[i].name)
	}
	m.now, err = m.d.state(ctx, m.sys, typePlanned)
	return planned, err
}

// importOf are the arguments of an import that makes another VM of the file.
func importOf(file string) []wsman.Argument {
	return []wsman.Argument{wsman.Arg("SystemDefinitionFile", wsman.Of(file)), wsman.Arg("SnapshotFolder", wsman.Of("")), wsman.Arg("GenerateNewSystemIdentifier", wsman.Of(true))}
}

// nameImported gives it the name by which it is known for ours, and a place.
func (m *making) nameImported(ctx context.Context) error {
	now, err := m.d.modifySystem(ctx, m.now, func(in *wsman.Instance) {
		in.Set("ElementName", wsman.Of(m.temporary))
		for _, root := range []string{"ConfigurationDataRoot", "SnapshotDataRoot", "SwapFileDataRoot", "GuestStateDataRoot"} {
			in.Set(root, wsman.Of(m.folder))
		}
	})
	if err != nil {
		return err
	}
	if m.now = now; !sameFile(now.text("ConfigurationDataRoot"), m.folder) {
		return fmt.Errorf("%w: the host keeps it in %s", errImport, now.text("ConfigurationDataRoot"))
	}
	return nil
}

// placeDisks leads each drive to its restored file, and takes out those that
// have none.
func (m *making) placeDisks(ctx context.Context) error {
	have, err := m.d.drives(ctx, m.now.ref)
	if err != nil {
		return err
	}
	var placed []vm.DiskID
	var drop []wsman.Ref
	for _, d := range have {
		file, restored := m.names[d.ID]
		switch {
		case restored:
			if err := m.d.put(ctx, d.setting, file); err != nil {
				return fmt.Errorf("disk %s: %w", d.ID, err)
			}
			placed = append(placed, d.ID)
		case d.setting != "":
			drop = append(drop, instance(classDisk, d.setting))
		}
	}
	for id := range m.names {
		if !slices.Contains(placed, id) {
			return fmt.Errorf("%w: it has no disk %s", errImport, id)
		}
	}
	media, err := m.settings(ctx, classDisk)
	if err != nil {
		return err
	}
	for _, o := range media {
		if o.text("ResourceSubType") != subDisk {
			drop = append(drop, instance(classDisk, o.text("InstanceID"))) // the medium was not backed up
		}
	}
	devices, err := m.settings(ctx, classDevice)
	if err != nil {
		return err
	}
	for _, o := range devices {
		// Through these a copy would write to what the original has for itself.
		if o.text("ResourceSubType") == subDirect {
			drop = append(drop, instance(o.Class, o.text("InstanceID")))
		}
	}
	fibres, err := m.d.fibres(ctx, m.now.ref)
	if err != nil {
		return err
	}
	for _, o := range fibres {
		drop = append(drop, instance(o.Class, o.text("InstanceID")))
	}
	if len(drop) == 0 {
		return nil
	}
	if _, err = m.d.manage(ctx, "RemoveResourceSettings", wsman.Arg("ResourceSettings", wsman.List(drop...))); err != nil || len(fibres) == 0 {
		return err
	}
	left, err := m.d.fibres(ctx, m.now.ref)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("%w: its Fibre Channel adapter could not be left out", errImport)
	}
	m.warn("the VM's Fibre Channel adapter is left out: through it the new VM would reach the disks of the old one")
	return nil
}

// placeNICs connects the network cards to nothing, unless asked, and lets the
// host give them addresses.
func (m *making) placeNICs(ctx context.Context) error {
	links, err := m.settings(ctx, classLink)
	if err != nil {
		return err
	}
	have := map[string]wsman.Ref{}
	if m.o.ConnectNICs {
		if have, err = m.d.switches(ctx); err != nil {
			return err
		}
	}
	for _, o := range links {
		name := o.text("LastKnownSwitchName")
		to, found := have[name]
		in := wsman.NewInstance(classLink).Set("InstanceID", wsman.Of(o.text("InstanceID")))
		want := int64(linkOff)
		if found {
			want = linkOn
			in.Set("HostResource", wsman.List(to.String()))
		} else if m.o.ConnectNICs && name != "" {
			m.warn("the host has no switch %q: a network card is not connected", name)
		}
		if err := m.d.modifyResource(ctx, in.Set("EnabledState", wsman.Of(uint16(want)))); err != nil {
			return err
		}
		back, err := m.d.Get(ctx, instance(classLink, o.text("InstanceID")))
		if err != nil {
			return err
		}
		if got, _ := (object{back}).number("EnabledState"); got != want {
			return fmt.Errorf("%w: a network card's connection could not be set", errImport)
		}
	}
	for _, class := range []string{classNIC, classLegacyNIC} {
		cards, err := m.settings(ctx, class)
		if err != nil {
			return err
		}
		for _, o := range cards {
			place := m.newAddress
			if m.o.KeepMACs {
				place = m.keepAddress
			}
			if err := place(ctx, o); err != nil {
				return err
			}
		}
	}
	if len(m.o.Definition.NICs) > 0 {
		m.noteNICs(m.o.Definition.NICs)
	}
	return nil
}

// newAddress takes a network card's address away, also one that the host had
// chosen: it chooses another when the VM starts. A copy with the address of the
// original does harm as soon as both are on one network.
func (m *making) newAddress(ctx context.Context, card object) error {
	had, id := card.text("Address"), card.text("InstanceID")
	if none(had) && !card.truth("StaticMacAddress") {
		return nil
	}
	err := m.d.modifyResource(ctx, wsman.NewInstance(card.Class).Set("InstanceID", wsman.Of(id)).Set("StaticMacAddress", wsman.Of(false)).Set("Address", wsman.Of(noAddress)))
	if err != nil && !hostSaid(err) {
		return err
	}
	back, err := m.d.Get(ctx, instance(card.Class, id))
	if err != nil {
		return err
	}
	if now := (object{back}); now.truth("StaticMacAddress") || !none(had) && strings.EqualFold(now.text("Address"), had) {
		m.warn("a network card still has the address %s of the original: give it another before both are on one network", macText(had))
	}
	return nil
}

// keepAddress makes a network card's address one that the host does not choose
// anew, which it may do with its own choice when the VM starts.
func (m *making) keepAddress(ctx context.Context, card object) error {
	had, id := card.text("Address"), card.text("InstanceID")
	if none(had) || card.truth("StaticMacAddress") {
		return nil
	}
	err := m.d.modifyResource(ctx, wsman.NewInstance(card.Class).Set("InstanceID", wsman.Of(id)).Set("StaticMacAddress", wsman.Of(true)).Set("Address", wsman.Of(had)))
	if err != nil && !hostSaid(err) {
		return err
	}
	back, err := m.d.Get(ctx, instance(card.Class, id))
	if err != nil {
		return err
	}
	if now := (object{back}); !now.truth("StaticMacAddress") || !strings.EqualFold(now.text("Address"), had) {
		m.warn("the host does not keep a network card's address %s: it may choose another when the VM starts", macText(had))
	}
	return nil
}

// noAddress is that of a network card whose VM was never started.
const noAddress = "000000000000"

func none(address string) bool { return strings.Trim(address, "0") == "" }

// realize makes a VM of what was imported; it keeps its GUID.
func (m *making) realize(ctx context.Context, planned wsman.Ref) error {
	e := m.entry(kindNewVM, m.temporary)
	e.Data[dataID] = m.sys.guid
	if err := m.run.Note(e); err != nil {
		return err
	}
	if _, err := m.d.manage(ctx, "RealizePlannedSystem", wsman.Arg("PlannedSystem", wsman.Of(planned))); err != nil {
		return err
	}
	_, list, err := m.d.systems(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(list, func(s system) bool { return s.guid == m.sys.guid || s.name == m.temporary })
	if i < 0 {
		return fmt.Errorf("%w: the host realized it, and has no such VM", errImport)
	}
	m.sys = list[i]
	if m.now, err = m.d.present(ctx, m.sys); err != nil {
		return err
	}
	return m.checkDisks(ctx)
}

// planned are the host's imported definitions that are no VMs yet.
func (d *Driver) planned(ctx context.Context) (list []system, err error) {
	all, err := d.query(ctx, "SELECT * FROM "+classPlanned)
	if errors.Is(err, fault.ErrUnsupported) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list what is being imported: %w", err)
	}
	for _, o := range all {
		if guid, ok := guidOf(o.text("Name")); ok {
			list = append(list, system{guid: guid, name: o.text("ElementName"), ref: plannedRef(guid)})
		}
	}
	return list, nil
}

func guids(list []system) (out []string) {
	for _, s := range list {
		out = append(out, s.guid)
	}
	return out
}

// destroyPlanned takes back an import: that of the entry's GUID or name, or
// that which its job made. Others are left alone: another program may be
// importing, too.
func (d *Driver) destroyPlanned(ctx context.Context, e journal.Entry) error {
	guid := e.Data[dataID]
	if job := parseRef(e.Data[dataJob]); job.Class != "" && guid == "" {
		waiting, cancel := context.WithTimeout(ctx, d.settleTime)
		err := d.wait(waiting, "its job", job)
		over := waiting.Err() != nil
		cancel()
		if over {
			return err
		}
		made, err := d.client.made(ctx, job, classPlanned)
		if err != nil {
			return err
		}
		if len(made) == 1 {
			guid, _ = guidOf(made[0].Key("Name"))
		}
	}
	list, err := d.planned(ctx)
	if err != nil {
		return err
	}
	var fresh []string
	for _, s := range list {
		if s.guid == guid || s.name == e.Name {
			return d.destroySystem(ctx, s.ref)
		}
		if !slices.Contains(lines(e.Data[dataBefore]), s.guid) {
			fresh = append(fresh, s.guid)
		}
	}
	if guid == "" && len(fresh) > 0 {
		return &UnknownImportError{fresh}
	}
	return nil
}

// An UnknownImportError names imported definitions of which nobody can say
// whose they are.
type UnknownImportError struct{ GUIDs []string }

func (e *UnknownImportError) Error() string {
	return "the host does not say what it imported; new since then, no VM, and left alone: " + strings.Join(e.GUIDs, ", ")
}
