package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/vm"
)

func (a *app) pointCmd() *cobra.Command {
	return noun("point", "list, show, protect, delete and prune restore points",
		a.pointListCmd(), a.pointShowCmd(), a.pointProtectCmd(), a.pointUnprotectCmd(), a.pointDeleteCmd(), a.pointPruneCmd())
}

// A pointLine is a restore point as point list --json prints it.
type pointLine struct {
	ID        point.ID  `json:"id"`
	VM        string    `json:"vm"`
	Time      time.Time `json:"time"`
	Grade     vm.Grade  `json:"grade"`
	SizeBytes int64     `json:"size_bytes"`
	Disks     int       `json:"disk_count"`
	ReadBytes int64     `json:"read_bytes"`
	NewBytes  int64     `json:"new_bytes"`
	Stored    int64     `json:"stored_bytes"`
	Suspect   string    `json:"suspect,omitempty"`
	Protected bool      `json:"protected"`
	Why       string    `json:"protected_why,omitempty"`
	Immutable time.Time `json:"immutable_until,omitzero"`
}

func (a *app) pointListCmd() *cobra.Command {
	var vmName string
	cmd := &cobra.Command{
		Use:   "list [VM]",
		Short: "list restore points by VM, oldest first",
		Example: `  backstay point list --repo /srv/backup
  backstay point list web01 --json --repo /srv/backup
  backstay point list --as-of "2026-11-22 03:15" --repo s3://s3.example.com/backups/site-a`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				if vmName != "" {
					return usage("name the VM once, as argument or with --vm")
				}
				vmName = args[0]
			}
			return a.pointList(cmd.Context(), vm.UnescapeName(vmName))
		},
	}
	cmd.Flags().StringVar(&vmName, "vm", "", "only this VM's")
	a.asOfFlag(cmd.Flags())
	return cmd
}

func (a *app) pointList(ctx context.Context, name string) error {
	r, err := a.openRepo(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	// Records that can't be read must not hide the others: in a disaster this
	// list is where people find out what there is.
	points, damage := r.Points(ctx)
	if damage != nil && len(points) == 0 {
		return damage
	}
	if name != "" {
		points = slices.DeleteFunc(points, func(p *point.RestorePoint) bool { return p.VM != name })
		if len(points) == 0 {
			return withHint(fmt.Errorf("VM %s: no restore point: %w", name, fault.ErrNotFound), `run "backstay point list" to see which VMs there are`)
		}
	}
	if a.json {
		for _, p := range points {
			l := pointLine{p.ID, p.VM, p.Time, p.Grade, p.SizeBytes(), len(p.Disks), p.Stats.ReadBytes, p.Stats.NewBytes, p.Stats.StoredBytes,
				p.Suspect, p.Protected, p.ProtectedWhy, time.Time{}}
			if p.ImmutableUntil != nil {
				l.Immutable = *p.ImmutableUntil
			}
			if err := a.printJSON(l); err != nil {
				return err
			}
		}
		return damage
	}
	if len(points) == 0 {
		a.say("no restore points yet")
		return nil
	}
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "POINT\tTIME\tGRADE\tSIZE\tREAD\tNEW\tSTORED\t")
	for _, p := range points {
		mark := whyProtected(p)
		if p.Suspect != "" {
			mark = strings.TrimSpace("SUSPECT " + mark)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.Ref(), p.Time.Local().Format("2006-01-02 15:04:05"), p.Grade,
			sizeText(p.SizeBytes()), sizeText(p.Stats.ReadBytes), sizeText(p.Stats.NewBytes), sizeText(p.Stats.StoredBytes), mark)
	}
	w.Flush()
	return damage
}

// findPoint opens the repository and the point that ref names.
func (a *app) findPoint(ctx context.Context, ref string) (*repo.Repository, *point.RestorePoint, error) {
	name, id, err := point.ParseRef(ref)
	if err != nil {
		return nil, nil, usageError{err}
	}
	r, err := a.openRepo(ctx)
	if err != nil {
		return nil, nil, err
	}
	p, err := r.Point(ctx, name, id)
	if err != nil {
		r.Close()
		if errors.Is(err, fault.ErrNotFound) {
			err = withHint(err, `run "backstay point list" to see which restore points there are`)
		}
		return nil, nil, err
	}
	return r, p, nil
}

func (a *app) pointShowCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "show POINT",
		Short: "show all that is recorded of one restore point",
		Example: `  backstay point show web01 --repo /srv/backup
  backstay point show web01/20261122T031500Z-7f3a9c01 --json --repo /srv/backup`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, p, err := a.findPoint(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer r.Close()
			if a.json {
				return a.printJSON(struct {
					*point.RestorePoint
					SizeBytes int64 `json:"size_bytes"`
				}{p, p.SizeBytes()})
			}
			a.printPoint(p)
			return nil
		},
	}
}

func (a *app) printPoint(p *point.RestorePoint) {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "point\t%s\n", p.Ref())
	fmt.Fprintf(w, "taken\t%s\n", p.Time.Local().Format("2006-01-02 15:04:05 -0700"))
	fmt.Fprintf(w, "source\t%s\n", p.Source)
	fmt.Fprintf(w, "grade\t%s\n", p.Grade)
	if p.FrozenFor > 0 {
		fmt.Fprintf(w, "frozen\t%s\n", timeText(p.FrozenFor))
	}
	if p.Machine.UUID != "" {
		fmt.Fprintf(w, "machine\t%s on %s (%s)\n", p.Machine.UUID, p.Machine.Host, p.Machine.Hypervisor)
	}
	if p.Suspect != "" {
		fmt.Fprintf(w, "SUSPECT\t%s\n", p.Suspect)
	}
	if why := whyProtected(p); why != "" {
		fmt.Fprintf(w, "stays\t%s\n", why)
	}
	for _, d := range p.Disks {
		fmt.Fprintf(w, "disk %s\t%s\n", d.ID, diskText(d))
	}
	for _, d := range p.Unprotected {
		fmt.Fprintf(w, "disk %s\tnot protected: %s\n", d.ID, d.Excluded)
	}
	for name, b := range p.Config {
		fmt.Fprintf(w, "config\t%s, %s\n", name, sizeText(b.SizeBytes))
	}
	for _, warn := range p.Warnings {
		fmt.Fprintf(w, "warning\t%s\n", warn)
	}
	w.Flush()
}

// diskText is one disk of a backup in a line.
func diskText(d point.Disk) string {
	s := fmt.Sprintf("%s, %s, read %s", d.Mode, sizeText(d.SizeBytes), sizeText(d.Stats.ReadBytes))
	if d.Reason != "" {
		s += " (" + d.Reason + ")"
	}
	if d.Mode == point.Incremental {
		s += fmt.Sprintf(", changed %s, audited %s", sizeText(d.Stats.ChangedBytes), sizeText(d.Stats.AuditBytes))
	}
	if d.Stats.RefillBytes > 0 {
		s += fmt.Sprintf(", %s again because the previous point could not be read", sizeText(d.Stats.RefillBytes))
	}
	return s + fmt.Sprintf(", new %s, stored %s", sizeText(d.Stats.NewBytes), sizeText(d.Stats.StoredBytes))
}

func (a *app) pointDeleteCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "delete VM/ID…",
		Short: "delete restore points",
		Long: `Delete restore points, each named in full. Other points stay whole, in
whatever order points are deleted. The space comes back with "repo vacuum".

A restore point whose record is damaged has no name any more that could be read.
With --force it is deleted by the name of its record, as "point list" and "repo
check" show it. So is, with --force, a point that "point protect" protects.`,
		Example: `  backstay point delete web01/20261122T031500Z-7f3a9c01 --repo /srv/backup
  backstay point delete 01kf2q9x3v0m5c8r7t1w4y6z2a-000000 --force --repo /srv/backup`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			for _, ref := range args {
				if repo.IsRecordName(ref) {
					if !force {
						return coded{code: exitRefused, hint: "only a copy of the repository could bring it back later; if you mean it, say --force",
							err: fmt.Errorf("restore point record %s, of a backup that began %s: nobody can say whose it is", ref, recordTime(ref))}
					}
					continue
				}
				if _, id, err := point.ParseRef(ref); err != nil {
					return usageError{err}
				} else if id == "" {
					return usage("%q names no restore point: to delete one, write it in full as VM/ID", ref)
				}
			}
			r, err := a.openRepo(ctx)
			if err != nil {
				return err
			}
			defer r.Close()
			for _, ref := range args {
				if repo.IsRecordName(ref) {
					if err := r.DeleteRecord(ctx, ref); err != nil {
						if len(repo.UnreadRecords(err)) == 0 {
							err = withHint(err, `run "backstay point list" to see which records are damaged`)
						}
						return err
					}
					if a.json {
						if err := a.printJSON(map[string]any{"deleted": ref}); err != nil {
							return err
						}
					} else {
						fmt.Fprintf(a.stdout, "deleted record %s\n", ref)
					}
					continue
				}
				name, id, _ := point.ParseRef(ref)
				drop := r.DeletePoint
				if force {
					drop = r.DeleteProtected
				}
				if err := drop(ctx, name, id); err != nil {
					if errors.Is(err, fault.ErrNotFound) {
						err = withHint(err, `run "backstay point list" to see which restore points there are`)
					}
					return err
				}
				if a.json {
					if err := a.printJSON(map[string]any{"deleted": id, "vm": name}); err != nil {
						return err
					}
				} else {
					fmt.Fprintf(a.stdout, "deleted %s\n", ref)
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "delete points that are protected, and a damaged record by its own name")
	return cmd
}

// recordTime is when the session of a record began, by its ULID.
func recordTime(name string) string {
	id, _, _ := strings.Cut(strings.TrimPrefix(name, "rp/"), "-")
	u, err := ulid.ParseStrict(strings.ToUpper(id))
	if err != nil {
		return "at an unknown time"
	}
	return u.Timestamp().Local().Format("2006-01-02 15:04:05")
}
