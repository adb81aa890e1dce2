package fencing

import (
	"fmt"
	"slices"
	"strings"
)

// Search visits every state that plan can lead to and gives their number. The
// error tells, step by step, the shortest way for some restore point to lose
// data.
func Search(plan Plan) (states int, err error) {
	all := []state{start(plan)}
	from, who := []int32{0}, []string{""}
	seen := map[state]struct{}{all[0]: {}}
	for at := 0; at < len(all) && err == nil; at++ {
		plan.next(all[at], func(by string, t state) {
			if _, ok := seen[t]; ok || err != nil {
				return
			}
			seen[t] = struct{}{}
			all, from, who = append(all, t), append(from, int32(at)), append(who, by)
			if point, bad := t.lost(); bad {
				err = fmt.Errorf("point %d lost data (%v):\n%s", point, plan, story(all, from, who))
			}
		})
	}
	return len(all), err
}

// story is how the last of all states came about.
func story(all []state, from []int32, who []string) string {
	var lines []string
	for at := len(all) - 1; at > 0; at = int(from[at]) {
		lines = append(lines, fmt.Sprintf("%s: %+v", who[at], all[at]))
	}
	slices.Reverse(lines)
	return strings.Join(lines, "\n")
}
