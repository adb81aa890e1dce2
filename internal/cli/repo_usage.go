package cli

import (
	"context"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/vm"
)

// repoUsage prints what each VM costs: with --json one VM a line.
func (a *app) repoUsage(ctx context.Context) error {
	r, err := a.openRepo(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	u, err := r.Usage(ctx)
	if err != nil {
		return err
	}
	if u.Missing > 0 {
		a.say("warning: %s that restore points need in no pack; run \"backstay repo check\"", plural(u.Missing, "chunk"))
	}
	if a.json {
		for _, v := range u.VMs {
			if err := a.printJSON(v); err != nil {
				return err
			}
		}
		return nil
	}
	if len(u.VMs) == 0 {
		a.say("no restore points yet")
		return nil
	}
	a.printUsage(u)
	return nil
}

func (a *app) printUsage(u repo.Usage) {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "SIZE\tNEEDS\tFREES\tSHARES\t  VM")
	for _, v := range u.VMs {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t  %s\n", sizeText(v.SizeBytes), sizeText(v.NeededBytes), sizeText(v.FreesBytes), sizeText(v.SharedBytes), usageName(v))
	}
	w.Flush()
	fmt.Fprintln(a.stdout)
	w = tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "POINT\tTIME\tSIZE\tNEW\tFREES")
	for _, v := range u.VMs {
		for _, p := range v.Points {
			fmt.Fprintf(w, "%s/%s\t%s\t%s\t%s\t%s\n", vm.EscapeName(v.VM), p.ID, p.Time.Local().Format("2006-01-02 15:04"),
				sizeText(p.SizeBytes), sizeText(p.NewBytes), sizeText(p.FreesBytes))
		}
	}
	w.Flush()
	fmt.Fprintf(a.stdout, "\nall restore points need %s. The words, in stored bytes (compressed, each chunk once):\n", sizeText(u.NeededBytes))
	fmt.Fprint(a.stdout, `  SIZE    how large the disks are to their guest; of a VM, those of its newest point
  NEEDS   what the VM's points need, also where others need it too
  FREES   what deleting it frees, with the next vacuum: nothing else needs that
  SHARES  what other VMs need too, and so stays when this one is deleted
  NEW     what no older point that is left needs: how the repository grew
Deleting two points frees what only they share, too, and so can free more than both alone.
`)
}

// sharesShown is how many partners of a VM are shown to people.
const sharesShown = 3

func usageName(v repo.VMUsage) string {
	var with []string
	for i, s := range v.SharedWith {
		if i == sharesShown {
			with = append(with, fmt.Sprintf("%d more", len(v.SharedWith)-i))
			break
		}
		with = append(with, fmt.Sprintf("%s %s", s.VM, sizeText(s.Bytes)))
	}
	name := fmt.Sprintf("%s, %s", v.VM, plural(int64(len(v.Points)), "point"))
	if len(with) > 0 {
		name += " (shares with " + strings.Join(with, ", ") + ")"
	}
	return name
}
