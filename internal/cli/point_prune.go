package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/retention"
	"github.com/backstay/backstay/internal/vm"
)

type pruneOptions struct {
	rule   retention.Rule
	within string
	dryRun bool
	force  bool
}

func (a *app) pointPruneCmd() *cobra.Command {
	var o pruneOptions
	cmd := &cobra.Command{
		Use:   "prune [VM…]",
		Short: "delete the restore points that no keep rule holds",
		Long: `Delete restore points of the named VMs, or of all, that no --keep rule holds,
and say for each point why it stays or goes. Rules add up, and each counts for
every VM by itself.

--keep-daily 7 keeps the newest point of each of the last 7 days that have one;
days begin in this machine's time zone, weeks on Monday. --within counts back
from the VM's newest point and never from the clock. A suspect point stands for a
day only if there is no other. A point whose time is still to come stays, and
counts for no rule: the clock that made it was wrong. The space comes back with
"repo vacuum".

Points that "point protect" protects stay, and those that the repository promised
to keep. The newest sound point of a VM is always kept: with --force, a rule that
keeps nothing (--keep-last 0) drops it too, of VMs that are named.`,
		Example: `  backstay point prune --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run --repo /srv/backup
  backstay point prune web01 --within 14d --keep-yearly 5 --repo /srv/backup
  backstay point prune old01 --keep-last 0 --force --repo /srv/backup`,
		RunE: func(cmd *cobra.Command, args []string) error {
			said := false
			cmd.Flags().Visit(func(f *pflag.Flag) {
				said = said || f.Name == "within" || strings.HasPrefix(f.Name, "keep-")
			})
			switch {
			case !o.force || !said: // prunePoints refuses what says nothing
			case len(args) == 0:
				return usage("--force may leave a VM without any point: name the VMs that it is for")
			default:
				o.rule.MayEmpty = true
			}
			return a.prunePoints(cmd.Context(), o, args)
		},
	}
	f := cmd.Flags()
	f.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "keep-within" { // by its family name, too
			name = "within"
		}
		return pflag.NormalizedName(name)
	})
	f.IntVar(&o.rule.Last, "keep-last", 0, "keep this many of the newest points")
	for _, p := range []struct {
		n      *int
		period string
	}{{&o.rule.Hourly, "hour"}, {&o.rule.Daily, "day"}, {&o.rule.Weekly, "week"}, {&o.rule.Monthly, "month"}, {&o.rule.Yearly, "year"}} {
		name := p.period + "ly"
		if p.period == "day" {
			name = "daily"
		}
		f.IntVar(p.n, "keep-"+name, 0, "keep the newest point of this many "+p.period+"s")
	}
	f.StringVar(&o.within, "within", "", "keep all that is no older than this before the newest point: 14d, 2w, 36h, 1y6m")
	f.BoolVar(&o.force, "force", false, "let the last point of the named VMs go, too, if the rule keeps nothing")
	f.BoolVarP(&o.dryRun, "dry-run", "n", false, "say what would be done, and do nothing")
	return cmd
}

// A pruneLine is what point prune --json prints of one point.
type pruneLine struct {
	ID      point.ID  `json:"id"`
	VM      string    `json:"vm"`
	Time    time.Time `json:"time"`
	Keep    bool      `json:"keep"`
	Reasons []string  `json:"reasons"`
	Deleted bool      `json:"deleted"` // false in a dry run
}

func (a *app) prunePoints(ctx context.Context, o pruneOptions, names []string) error {
	if o.within != "" {
		var err error
		if o.rule.Within, err = retention.ParseAge(o.within); err != nil {
			return usage("--within: %w", err)
		}
	}
	o.rule.Zone, o.rule.Now = time.Local, time.Now()
	if _, err := retention.Decide(nil, o.rule); err != nil {
		if errors.Is(err, retention.ErrNoRule) {
			return usage("no rule: say at least one of --keep-last, --keep-hourly, --keep-daily, --keep-weekly, --keep-monthly, --keep-yearly, --within")
		}
		return usageError{err}
	}
	r, err := a.openRepo(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	// Whose the unreadable ones are nobody knows, and so not what would be left.
	points, err := r.Points(ctx)
	if err != nil {
		return err
	}
	byVM := map[string][]retention.Point{}
	for _, p := range points {
		byVM[p.VM] = append(byVM[p.VM], retention.Point{ID: string(p.ID), Time: p.Time, Suspect: p.Suspect != "",
			Protected: whyProtected(p)})
	}
	var vms []string
	for name := range byVM {
		vms = append(vms, name)
	}
	if len(names) > 0 {
		vms = nil
		for _, n := range names {
			n = vm.UnescapeName(n)
			if byVM[n] == nil {
				return withHint(fmt.Errorf("VM %s: no restore point: %w", n, fault.ErrNotFound), `run "backstay point list" to see which VMs there are`)
			}
			vms = append(vms, n)
		}
	}
	slices.Sort(vms)
	vms = slices.Compact(vms)

	var lines []pruneLine
	for _, name := range vms {
		decisions, err := retention.Decide(byVM[name], o.rule)
		if err != nil {
			return err
		}
		for _, d := range decisions {
			lines = append(lines, pruneLine{point.ID(d.ID), name, d.Time, d.Keep, d.Reasons, false})
		}
	}
	if !a.json {
		a.printPrune(lines)
	}
	kept, gone := 0, 0
	// Oldest first, so that what is left after ^C is what one would expect.
	for i := len(lines) - 1; i >= 0; i-- {
		l := &lines[i]
		if l.Keep {
			kept++
			continue
		}
		gone++
		if o.dryRun {
			continue
		}
		if err := r.DeletePoint(ctx, l.VM, l.ID); errors.As(err, new(*repo.ImmutableError)) || errors.As(err, new(*repo.ProtectedError)) || errors.Is(err, fault.ErrHeld) {
			// The storage keeps it a little longer than was promised, or
			// somebody protected it meanwhile.
			a.say("it stays: %v", err)
			l.Keep, l.Reasons = true, []string{err.Error()}
			gone--
			kept++
			continue
		} else if err != nil && !errors.Is(err, fault.ErrNotFound) {
			return fmt.Errorf("%s/%s: %w", vm.EscapeName(l.VM), l.ID, err)
		}
		l.Deleted = true
	}
	if a.json {
		for _, l := range lines {
			if err := a.printJSON(l); err != nil {
				return err
			}
		}
		return nil
	}
	switch {
	case o.dryRun:
		fmt.Fprintf(a.stdout, "%d would stay, %d would go\n", kept, gone)
	default:
		fmt.Fprintf(a.stdout, "kept %d, deleted %d\n", kept, gone)
		if gone > 0 {
			a.say(`the space comes back with "backstay repo vacuum"`)
		}
	}
	return nil
}

// whyProtected says why p stays whatever a keep rule says; empty if it need not.
func whyProtected(p *point.RestorePoint) string {
	switch {
	case p.Protected && p.ProtectedWhy != "":
		return "protected: " + p.ProtectedWhy
	case p.Protected:
		return "protected"
	case p.ImmutableUntil != nil && p.ImmutableUntil.After(time.Now()):
		return "immutable until " + p.ImmutableUntil.Local().Format("2006-01-02 15:04:05")
	}
	return ""
}

func (a *app) printPrune(lines []pruneLine) {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "POINT\tTIME\t\tWHY")
	for _, l := range lines {
		word := "delete"
		if l.Keep {
			word = "keep"
		}
		fmt.Fprintf(w, "%s/%s\t%s\t%s\t%s\n", vm.EscapeName(l.VM), l.ID, l.Time.Local().Format("2006-01-02 15:04:05"), word, strings.Join(l.Reasons, ", "))
	}
	w.Flush()
}
