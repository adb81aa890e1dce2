package retention

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func day(s string) time.Time {
	t, err := time.Parse("2006-01-02 15:04", s)
	if err != nil {
		panic(err)
	}
	return t
}

func at(times ...string) []Point {
	var points []Point
	for _, s := range times {
		points = append(points, Point{ID: s, Time: day(s)})
	}
	return points
}

func kept(t *testing.T, points []Point, rule Rule) []string {
	t.Helper()
	all, err := Decide(points, rule)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, d := range all {
		if d.Keep {
			ids = append(ids, d.ID)
		}
		if len(d.Reasons) == 0 {
			t.Errorf("%s has no reason", d.ID)
		}
	}
	return ids
}

func TestDecide(t *testing.T) {
	berlin := time.FixedZone("CET", 3600)
	suspect := at("2026-11-20 10:00", "2026-11-20 12:00", "2026-11-21 12:00")
	suspect[1].Suspect, suspect[2].Suspect = true, true
	protected := at("2020-01-01 00:00", "2026-11-20 12:00")
	protected[0].Protected = "protected: audit"
	for _, c := range []struct {
		name   string
		points []Point
		rule   Rule
		want   []string
	}{
		{"the newest of a day stands for it", at("2026-11-20 01:00", "2026-11-20 23:00", "2026-11-19 12:00"), Rule{Daily: 2},
			[]string{"2026-11-20 23:00", "2026-11-19 12:00"}},
		{"days without a point do not count", at("2026-11-20 01:00", "2026-10-01 01:00", "2026-09-01 01:00"), Rule{Daily: 2},
			[]string{"2026-11-20 01:00", "2026-10-01 01:00"}},
		{"rules add up", at("2026-11-20 01:00", "2026-11-19 01:00", "2026-10-01 01:00", "2025-10-01 01:00"), Rule{Last: 1, Monthly: 2, Yearly: 2},
			[]string{"2026-11-20 01:00", "2026-10-01 01:00", "2025-10-01 01:00"}},
		{"a week can lie in two years", at("2026-12-31 12:00", "2027-01-01 12:00", "2026-12-27 12:00"), Rule{Weekly: 2},
			[]string{"2027-01-01 12:00", "2026-12-27 12:00"}},
		{"days begin where the rule says", at("2026-11-20 22:30", "2026-11-20 23:30"), Rule{Daily: 2, Zone: berlin},
			[]string{"2026-11-20 23:30", "2026-11-20 22:30"}},
		{"within counts from the newest point", at("2026-11-20 12:00", "2026-11-06 12:00", "2026-11-06 11:59"), Rule{Within: Age{Days: 14}},
			[]string{"2026-11-20 12:00", "2026-11-06 12:00"}},
		{"a sound point stands for its day", suspect[:2], Rule{Daily: 1}, []string{"2026-11-20 10:00"}},
		{"sound points come first among the last", suspect, Rule{Last: 2}, []string{"2026-11-21 12:00", "2026-11-20 10:00"}},
		{"a day of suspect points keeps one", suspect, Rule{Daily: 1}, []string{"2026-11-21 12:00", "2026-11-20 10:00"}},
		{"protected points stay", protected, Rule{Last: 1}, []string{"2026-11-20 12:00", "2020-01-01 00:00"}},
		{"no points", nil, Rule{Last: 1}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := kept(t, c.points, c.rule); !slices.Equal(got, c.want) {
				t.Errorf("kept %v, want %v", got, c.want)
			}
		})
	}
}

func TestARuleThatKeepsNothingIsRefused(t *testing.T) {
	if _, err := Decide(at("2026-11-20 01:00"), Rule{}); !errors.Is(err, ErrNoRule) {
		t.Errorf("got %v", err)
	}
	if _, err := Decide(nil, Rule{Last: 1, Daily: -1}); err == nil {
		t.Error("a negative count was taken")
	}
}

func TestAClockThatJumpedAheadLetsNothingElseGo(t *testing.T) {
	points := at("2026-11-20 12:00", "2026-11-19 12:00", "2026-11-18 12:00", "2036-01-01 00:00")
	if got := kept(t, points, Rule{Daily: 4}); len(got) != 4 {
		t.Errorf("kept only %v", got)
	}
}

// A point that says it is of a year to come was made by a wrong clock. It must
// not push out what is made by a right one, whatever the rule.
func TestAPointOfTheFutureCountsForNothing(t *testing.T) {
	points := at("2036-01-01 00:00", "2026-11-22 12:00", "2026-11-21 12:00", "2026-11-20 12:00")
	now := day("2026-11-22 13:00")
	for name, c := range map[string]struct {
		rule Rule
		want []string
	}{
		"last":   {Rule{Last: 1}, []string{"2036-01-01 00:00", "2026-11-22 12:00"}},
		"daily":  {Rule{Daily: 2}, []string{"2036-01-01 00:00", "2026-11-22 12:00", "2026-11-21 12:00"}},
		"within": {Rule{Within: Age{Days: 1}}, []string{"2036-01-01 00:00", "2026-11-22 12:00", "2026-11-21 12:00"}},
		"yearly": {Rule{Yearly: 1}, []string{"2036-01-01 00:00", "2026-11-22 12:00"}},
	} {
		c.rule.Now = now
		if got := kept(t, points, c.rule); !slices.Equal(got, c.want) {
			t.Errorf("%s: kept %v, not %v", name, got, c.want)
		}
	}
	// Clocks of two machines are never quite the same.
	if got := kept(t, at("2026-11-22 13:05", "2026-11-22 12:00"), Rule{Last: 1, Now: now}); len(got) != 1 {
		t.Errorf("five minutes ahead: kept %v", got)
	}
	if got := kept(t, points[:1], Rule{Last: 1, Now: now}); len(got) != 1 {
		t.Errorf("nothing but the future: kept %v", got)
	}
}

// Whatever the time is, it can only keep more.
func TestTheTimeOnlyKeepsMore(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := day("2026-06-01 00:00")
		var points []Point
		for i := range rapid.IntRange(1, 12).Draw(t, "points") {
			h := rapid.IntRange(0, 24*200).Draw(t, "hours")
			points = append(points, Point{ID: fmt.Sprint(i), Time: base.Add(time.Duration(h) * time.Hour), Suspect: rapid.Bool().Draw(t, "suspect")})
		}
		n := func(s string) int { return rapid.IntRange(0, 3).Draw(t, s) }
		rule := Rule{Last: 1 + n("last"), Daily: n("daily"), Weekly: n("weekly"), Within: Age{Days: n("within")}}
		without, err := Decide(points, rule)
		if err != nil {
			t.Fatal(err)
		}
		rule.Now = base.Add(time.Duration(rapid.IntRange(-24, 24*210).Draw(t, "now")) * time.Hour)
		with, err := Decide(points, rule)
		if err != nil {
			t.Fatal(err)
		}
		for i := range without {
			if without[i].Keep && !with[i].Keep {
				t.Fatalf("at %v %s of %v goes, which stays otherwise", rule.Now, with[i].ID, with[i].Time)
			}
		}
	})
}

func TestParseAge(t *testing.T) {
	for _, s := range []string{"14d", "1y6m", "36h", "1y2m3d4h"} {
		a, err := ParseAge(s)
		if err != nil || a.String() != s {
			t.Errorf("%s: %v, %v", s, a, err)
		}
	}
	if a, err := ParseAge("2w1d"); err != nil || a.Days != 15 {
		t.Errorf("2w1d: %v, %v", a, err)
	}
	for _, s := range []string{"", "d", "14", "0d", "-1d", "1.5d", "1d1y", "1d1d", "99999999999999999999d", "1s", "5d "} {
		if a, err := ParseAge(s); err == nil {
			t.Errorf("%q gave %v", s, a)
		}
	}
}

// points draws up to 60 points of some weeks, some of one time.
func drawPoints(t *rapid.T) []Point {
	hours := rapid.SliceOfN(rapid.IntRange(0, 24*400), 0, 60).Draw(t, "hours")
	var points []Point
	for i, h := range hours {
		points = append(points, Point{
			ID:      fmt.Sprintf("%04d", i),
			Time:    day("2025-11-20 00:00").Add(time.Duration(h) * time.Hour),
			Suspect: rapid.IntRange(0, 9).Draw(t, "suspect") == 0,
		})
		if rapid.IntRange(0, 19).Draw(t, "protected") == 0 {
			points[i].Protected = "protected"
		}
	}
	return points
}

func drawRule(t *rapid.T) Rule {
	n := func(name string) int { return rapid.IntRange(0, 8).Draw(t, name) }
	return Rule{Last: n("last") + 1, Hourly: n("hourly"), Daily: n("daily"), Weekly: n("weekly"), Monthly: n("monthly"), Yearly: n("yearly"), Within: Age{Days: n("within")}}
}

func keeps(t *rapid.T, points []Point, rule Rule) map[string]bool {
	all, err := Decide(points, rule)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != len(points) {
		t.Fatalf("%d decisions for %d points", len(all), len(points))
	}
	ids := map[string]bool{}
	for _, d := range all {
		if d.Keep {
			ids[d.ID] = true
		}
	}
	return ids
}

func TestProperties(t *testing.T) {
	t.Run("the order of the points does not matter", rapid.MakeCheck(func(t *rapid.T) {
		points, rule := drawPoints(t), drawRule(t)
		want := keeps(t, points, rule)
		got := keeps(t, rapid.Permutation(points).Draw(t, "order"), rule)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("%v and %v", got, want)
		}
	}))
	t.Run("what was kept is kept when asked again", rapid.MakeCheck(func(t *rapid.T) {
		points, rule := drawPoints(t), drawRule(t)
		first := keeps(t, points, rule)
		rest := slices.DeleteFunc(slices.Clone(points), func(p Point) bool { return !first[p.ID] })
		if again := keeps(t, rest, rule); len(again) != len(first) {
			t.Fatalf("kept %d, then %d of these", len(first), len(again))
		}
	}))
	t.Run("a larger rule keeps no less", rapid.MakeCheck(func(t *rapid.T) {
		points, rule := drawPoints(t), drawRule(t)
		small := keeps(t, points, rule)
		for _, f := range []func(*Rule){func(r *Rule) { r.Last++ }, func(r *Rule) { r.Daily++ }, func(r *Rule) { r.Weekly++ }, func(r *Rule) { r.Within.Days++ }} {
			larger := rule
			f(&larger)
			large := keeps(t, points, larger)
			for id := range small {
				if !large[id] {
					t.Fatalf("%s is lost under the larger rule", id)
				}
			}
		}
	}))
	t.Run("to protect a point changes nothing for others", rapid.MakeCheck(func(t *rapid.T) {
		points, rule := drawPoints(t), drawRule(t)
		if len(points) == 0 {
			return
		}
		before := keeps(t, points, rule)
		p := &points[rapid.IntRange(0, len(points)-1).Draw(t, "which")]
		p.Protected = "protected"
		after := keeps(t, points, rule)
		before[p.ID] = true
		if fmt.Sprint(before) != fmt.Sprint(after) {
			t.Fatalf("%v became %v when %s was protected", before, after, p.ID)
		}
	}))
	t.Run("a VM is emptied only by a rule that says so and keeps nothing", rapid.MakeCheck(func(t *rapid.T) {
		points, rule := drawPoints(t), drawRule(t)
		want := keeps(t, points, rule)
		rule.MayEmpty = true
		if got := keeps(t, points, rule); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("%v became %v though the rule keeps something", want, got)
		}
		for id := range keeps(t, points, Rule{MayEmpty: true}) {
			if i := slices.IndexFunc(points, func(p Point) bool { return p.ID == id }); points[i].Protected == "" {
				t.Fatalf("%s stays and is not protected", id)
			}
		}
	}))
	t.Run("each point that stays has a reason, and that of a protected one comes first", rapid.MakeCheck(func(t *rapid.T) {
		all, err := Decide(drawPoints(t), drawRule(t))
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range all {
			if len(d.Reasons) == 0 || d.Protected != "" && (!d.Keep || d.Reasons[0] != d.Protected) {
				t.Fatalf("%+v", d)
			}
		}
	}))
	t.Run("a sound point always stays, and protected ones do", rapid.MakeCheck(func(t *rapid.T) {
		points, rule := drawPoints(t), drawRule(t)
		ids := keeps(t, points, rule)
		sound, soundKept := 0, 0
		for _, p := range points {
			if p.Protected != "" && !ids[p.ID] {
				t.Fatalf("%s is protected and goes", p.ID)
			}
			if !p.Suspect {
				sound++
				if ids[p.ID] {
					soundKept++
				}
			}
		}
		if len(points) > 0 && len(ids) == 0 || sound > 0 && soundKept == 0 {
			t.Fatalf("kept %d of %d, %d sound of %d", len(ids), len(points), soundKept, sound)
		}
	}))
}
