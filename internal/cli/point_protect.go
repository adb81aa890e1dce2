package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
)

func (a *app) pointProtectCmd() *cobra.Command {
	var o repo.ProtectOptions
	cmd := &cobra.Command{
		Use:   "protect POINT…",
		Short: "keep restore points from being deleted and pruned",
		Long: `Protect restore points: "point delete" refuses them and "point prune" keeps them,
until "point unprotect". It guards against mistakes, and lets a keep rule have
exceptions; whoever may delete may also take a protection away. What nobody can
take away is "repo init --immutable-for".

When the command has said that a point is protected, no "point delete" and no
"point prune" that was running meanwhile takes it, either.`,
		Example: `  backstay point protect web01 --why "before the migration" --repo /srv/backup
  backstay point protect web01/20261122T031500Z-7f3a9c01 --repo /srv/backup`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.eachPoint(cmd, args, true, func(r *repo.Repository, p *point.RestorePoint) error {
				if err := r.Protect(cmd.Context(), p.VM, p.ID, o); err != nil {
					return err
				}
				return a.told(p, "protected %s", true)
			})
		},
	}
	cmd.Flags().StringVar(&o.Why, "why", "", "the reason, which point list and point prune show")
	cmd.Flags().BoolVar(&o.Force, "force", false, "say that no delete is running that began and did not end")
	return cmd
}

func (a *app) pointUnprotectCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "unprotect VM/ID…",
		Short: "let protected restore points be deleted and pruned again",
		Long: `Take the protection of restore points away, each named in full. They are deleted
by the next "point prune" whose rule does not keep them.`,
		Example: `  backstay point unprotect web01/20261122T031500Z-7f3a9c01 --repo /srv/backup`,
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.eachPoint(cmd, args, false, func(r *repo.Repository, p *point.RestorePoint) error {
				was, err := r.Unprotect(cmd.Context(), p.VM, p.ID)
				if err != nil {
					return err
				}
				text := "unprotected %s"
				if !was {
					text = "%s was not protected"
				}
				return a.told(p, text, false)
			})
		},
	}
}

// eachPoint calls fn for the restore points that refs name; newest says whether
// a VM stands for its newest one.
func (a *app) eachPoint(cmd *cobra.Command, refs []string, newest bool, fn func(*repo.Repository, *point.RestorePoint) error) error {
	ctx := cmd.Context()
	for _, ref := range refs {
		if _, id, err := point.ParseRef(ref); err != nil {
			return usageError{err}
		} else if id == "" && !newest {
			return usage("%q names no restore point: write it in full as VM/ID", ref)
		}
	}
	r, err := a.openRepo(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	for _, ref := range refs {
		name, id, _ := point.ParseRef(ref)
		p, err := r.Point(ctx, name, id)
		if err == nil {
			err = fn(r, p)
		}
		if errors.Is(err, fault.ErrNotFound) {
			err = withHint(err, `run "backstay point list" to see which restore points there are`)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// told says what became of the protection of p.
func (a *app) told(p *point.RestorePoint, text string, protected bool) error {
	if a.json {
		return a.printJSON(map[string]any{"id": p.ID, "vm": p.VM, "protected": protected})
	}
	_, err := fmt.Fprintf(a.stdout, text+"\n", p.Ref())
	return err
}
