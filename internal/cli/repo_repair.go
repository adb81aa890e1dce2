package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/repo"
)

func (a *app) repoRepairCmd() *cobra.Command {
	var o repo.RepairOptions
	var from string
	cmd := &cobra.Command{
		Use:   "repair",
		Short: "heal what is damaged, as far as that can be done",
		Long: `Heal what is damaged, as far as that can be done: from parity, where the
repository keeps it, and from a copy of the repository, where one is named.
It needs no key, and may run beside backups.

It is about damage that earlier checks found, and what is easily seen;
--scrub and --read-data first look for all there is. Parity that is missing or
damaged is made again.

What can be read or healed of damaged packs is stored again in new ones. The
damaged packs stay as they are until "backstay repo vacuum" finds that nothing
in them is needed. What cannot be healed is listed with the restore points,
disks and byte ranges that it hits, and makes the exit code 3: the next backup of
those VMs stores again what they still have of it.`,
		Example: `  backstay repo repair --dry-run --repo /srv/backup
  backstay repo repair --scrub --repo /srv/backup
  backstay repo repair --from /mnt/offsite/backup --repo /srv/backup`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.repoRepair(cmd.Context(), o, from) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.DryRun, "dry-run", false, "say what would be healed and change nothing")
	f.BoolVar(&o.Scrub, "scrub", false, "first re-read every stored byte; needs no key")
	f.BoolVar(&o.ReadData, "read-data", false, "first decrypt, decompress and re-hash everything")
	f.StringVar(&from, "from", "", "a copy of this repository, such as a replica of its storage: a path or URL")
	return cmd
}

func (a *app) repoRepair(ctx context.Context, o repo.RepairOptions, from string) error {
	st, err := a.openStore(ctx)
	if err != nil {
		return err
	}
	mended, err := repo.MendConfig(ctx, st, o.DryRun)
	st.Close()
	if err != nil {
		return fmt.Errorf("repository %s: %w", st, err)
	}
	if mended && o.DryRun {
		a.say("repo.json is damaged and would be healed from its parity; more can be said only then")
		return a.repairDone(repo.RepairReport{Mended: []repo.Mended{{Object: "repo.json", By: []string{repo.ByParity}}}}, true)
	}
	r, err := a.openCareful(ctx, o.ReadData)
	if err != nil {
		return err
	}
	defer r.Close()
	if from != "" {
		there := *a
		there.repoURL = from
		st, err := there.openStore(ctx)
		if err != nil {
			return fmt.Errorf("--from: %w", err)
		}
		defer st.Close()
		if o.From, err = repo.OpenKeyless(ctx, st); err != nil {
			return fmt.Errorf("--from: repository %s: %w", st, err)
		}
		defer o.From.Close()
	}
	bar := a.newBar("repairing")
	o.Progress = bar.set
	rep, err := r.Repair(ctx, o)
	bar.end()
	if err != nil {
		return err
	}
	if mended {
		rep.Mended = append([]repo.Mended{{Object: "repo.json", By: []string{repo.ByParity}}}, rep.Mended...)
	}
	return a.repairDone(rep, o.DryRun)
}

// repairDone tells what was done and turns what is left into an exit code.
func (a *app) repairDone(rep repo.RepairReport, dry bool) error {
	if a.json {
		if err := a.printJSON(repairJSON(rep, dry)); err != nil {
			return err
		}
	} else {
		a.printRepair(rep, dry)
	}
	if len(rep.Left.Findings) > 0 {
		return coded{code: exitCorrupt, hint: repairHint(rep),
			err: fmt.Errorf("%s cannot be healed", plural(int64(len(rep.Left.Findings)), "damaged object"))}
	}
	return nil
}

func (a *app) printRepair(rep repo.RepairReport, dry bool) {
	if dry {
		fmt.Fprintln(a.stdout, "what would be done:")
	}
	for _, m := range rep.Mended {
		var parts []string
		if m.Healed > 0 {
			parts = append(parts, fmt.Sprintf("%s healed from %s", plural(int64(m.Healed), "record"), strings.Join(m.By, " and ")))
		}
		if m.Sound > 0 {
			parts = append(parts, plural(int64(m.Sound), "sound record")+" stored again")
		}
		if slices.Contains(m.By, repo.ByName) {
			parts = append(parts, "put back, it lay under another name")
		} else if len(parts) == 0 && len(m.By) > 0 {
			parts = append(parts, "healed from "+strings.Join(m.By, " and "))
		}
		if len(parts) > 0 {
			fmt.Fprintf(a.stdout, "%s: %s\n", m.Object, strings.Join(parts, ", "))
		}
		if m.Err != nil {
			fmt.Fprintf(a.stdout, "%s: %v\n", m.Object, m.Err)
		}
	}
	if rep.ParityMade > 0 {
		fmt.Fprintf(a.stdout, "parity for %s made (%s)\n", plural(rep.ParityMade, "object"), sizeText(rep.ParityBytes))
	}
	a.printFindings(rep.Left)
	switch {
	case len(rep.Left.Findings) > 0:
	case len(rep.Mended) == 0 && rep.ParityMade == 0:
		fmt.Fprintln(a.stdout, "nothing to repair")
	default:
		fmt.Fprintln(a.stdout, "all is well again")
	}
}

func repairHint(rep repo.RepairReport) string {
	for _, f := range rep.Left.Findings {
		if len(f.Hits) > 0 {
			return `name a copy of the repository with --from, or back up the VMs that are hit again, which stores again what they still have of it; delete the points that a later "backstay repo check" still names`
		}
	}
	return `"backstay repo vacuum" replaces damaged indexes and notes; name a copy of the repository with --from for the rest`
}

func repairJSON(rep repo.RepairReport, dry bool) map[string]any {
	type mended struct {
		Object string   `json:"object"`
		By     []string `json:"healed_from"`
		Sound  int      `json:"sound_records"`
		Healed int      `json:"healed_records"`
		Lost   int      `json:"lost_records"`
		Error  string   `json:"error,omitempty"`
	}
	list := []mended{}
	for _, m := range rep.Mended {
		x := mended{m.Object, append([]string{}, m.By...), m.Sound, m.Healed, m.Lost, ""}
		if m.Err != nil {
			x.Error = m.Err.Error()
		}
		list = append(list, x)
	}
	return map[string]any{"dry_run": dry, "mended": list, "parity_made": rep.ParityMade, "parity_bytes": rep.ParityBytes,
		"stored_bytes": rep.StoredBytes, "sound": len(rep.Left.Findings) == 0, "findings": findingsJSON(rep.Left.Findings)}
}
