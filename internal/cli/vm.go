package cli

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/vm"
)

func (a *app) vmCmd() *cobra.Command {
	return noun("vm", "list the VMs of a host, reset their change tracking", a.vmListCmd(), a.vmResetCmd())
}

func (a *app) vmListCmd() *cobra.Command {
	o := driverOptions{host: hostCredentials()}
	cmd := &cobra.Command{
		Use:   "list URL",
		Short: "list the VMs of a host with their disks",
		Example: `  backstay vm list kvm:///system
  backstay vm list hyperv://backup@hv01 --host-password-file hv01.password
  backstay vm list 'hyperv://backup@hvcluster?node=HV02=10.0.0.2'           # of all nodes`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			s, err := parseSource(args[0])
			if err != nil {
				return err
			}
			if s.scheme == "" {
				return usage("%q is no URL of a host: want for example kvm:///system", args[0])
			}
			if s.vm != "" {
				return usage("%q names a VM: want the host alone, for example kvm:///system", args[0])
			}
			d, err := a.openDriver(ctx, s, o)
			if err != nil {
				return err
			}
			defer d.Close()
			machines, err := d.Machines(ctx)
			if err != nil {
				return err
			}
			return a.printMachines(machines)
		},
	}
	addHostFlags(cmd.Flags(), &o.host)
	return cmd
}

func (a *app) printMachines(machines []vm.Machine) error {
	if a.json {
		for _, m := range machines {
			if err := a.printJSON(m); err != nil {
				return err
			}
		}
		return nil
	}
	if len(machines) == 0 {
		a.say("no VMs on this host")
		return nil
	}
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "VM\tSTATE\tDISK\tSIZE\tFORMAT\tSOURCE")
	for _, m := range machines {
		name, state := m.Name, m.State
		if len(m.Disks) == 0 {
			fmt.Fprintf(w, "%s\t%s\t-\t\t\t\n", name, state)
		}
		for _, d := range m.Disks {
			src := d.Source
			if d.Excluded != "" {
				src += " (not protected: " + d.Excluded + ")"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", name, state, d.ID, sizeText(d.SizeBytes), d.Format, src)
			name, state = "", ""
		}
	}
	return w.Flush()
}

// referencePoints is a driver whose host keeps tracking that has no names, so
// that what is ours is known from the journal alone.
type referencePoints interface {
	UnknownReferencePoints(ctx context.Context, vm string) ([]string, error)
	DestroyReferencePoint(ctx context.Context, vm, id string) error
}

func (a *app) vmResetCmd() *cobra.Command {
	o := driverOptions{host: hostCredentials()}
	var destroy string
	cmd := &cobra.Command{
		Use:   "reset-tracking SOURCE",
		Short: "drop a VM's change tracking, so that the next backup reads everything",
		Long: `Drop what this repository's backups left on the host to track changes of a VM.
Only what carries this repository's id is removed. Restore points stay as they
are; the next backup reads the whole VM and stores only what is new.

Reference points of Hyper-V carry no name: which of them are this repository's
is in --state-dir. Those that are not there, of another product or of a state
directory that was lost, are named and left alone; --reference-point destroys
one of them, and nothing else.`,
		Example: `  backstay vm reset-tracking kvm:///system/web01 --repo /srv/backup
  backstay vm reset-tracking hyperv://backup@hv01/web01 --reference-point 'Microsoft:…\…'`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			s, err := parseSource(args[0])
			if err != nil {
				return err
			}
			if s.scheme == "" || s.vm == "" {
				return usage("%q is no VM: want for example kvm:///system/web01", args[0])
			}
			if destroy != "" {
				return a.destroyReferencePoint(ctx, s, o, destroy)
			}
			id, err := a.repoID(ctx)
			if err != nil {
				return err
			}
			d, err := a.openDriver(ctx, s, o)
			if err != nil {
				return err
			}
			defer d.Close()
			r, ok := d.(hypervisor.TrackingResetter)
			if !ok {
				return errors.New("this kind of source has no change tracking")
			}
			if err := r.ResetTracking(ctx, s.vm, id); err != nil {
				if errors.Is(err, fault.ErrNotFound) {
					err = withHint(err, `run "backstay vm list %s" to see which VMs it has`, s.host)
				}
				return err
			}
			var unknown []string
			if p, ok := d.(referencePoints); ok {
				if unknown, err = p.UnknownReferencePoints(ctx, s.vm); err != nil {
					a.say("which other reference points the host has: %v", err)
				}
			}
			if a.json {
				return a.printJSON(map[string]any{"vm": s.vm, "reset": true, "unknown_reference_points": unknown})
			}
			fmt.Fprintf(a.stdout, "%s: change tracking dropped; the next backup reads everything\n", s.vm)
			for _, p := range unknown {
				fmt.Fprintf(a.stdout, "left alone, as it is not in %s: reference point %s\n", a.stateDir, p)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&destroy, "reference-point", "", "destroy this one reference point of a Hyper-V host, which is not in --state-dir")
	addHostFlags(cmd.Flags(), &o.host)
	return cmd
}

// destroyReferencePoint destroys one that is not in the journal.
func (a *app) destroyReferencePoint(ctx context.Context, s source, o driverOptions, id string) error {
	d, err := a.openDriver(ctx, s, o)
	if err != nil {
		return err
	}
	defer d.Close()
	p, ok := d.(referencePoints)
	if !ok {
		return usage("--reference-point is for Hyper-V hosts alone")
	}
	err = p.DestroyReferencePoint(ctx, s.vm, id)
	switch {
	case errors.Is(err, fault.ErrExists):
		return withHint(err, "leave --reference-point out, and name that repository")
	case errors.Is(err, fault.ErrNotFound):
		return withHint(err, `without --reference-point the command names those that the host has`)
	case err != nil:
		return err
	case a.json:
		return a.printJSON(map[string]any{"vm": s.vm, "destroyed": id})
	}
	fmt.Fprintf(a.stdout, "%s: reference point %s destroyed\n", s.vm, id)
	return nil
}

// repoID is the repository's id, which names on hosts carry.
func (a *app) repoID(ctx context.Context) (string, error) {
	r, err := a.openCareful(ctx, false)
	if err != nil {
		return "", err
	}
	defer r.Close()
	return r.ID(), nil
}
