package placement

// levelCount is how many levels of free room hosts are told apart by.
const levelCount = 128

// levels keeps hosts by how much is free on them, so that a decision that wants
// the tightest fit finds it among ten thousand hosts without looking at each.
// level = ⌊free share of the scarcest resource × levelCount⌋; an empty host has
// the highest level, so that a host in use is found first.
type levels struct {
	at    [levelCount + 1][]int
	where []place // by host
}

type place struct{ level, slot int }

func (l *levels) add(i, level int) {
	l.where = append(l.where, place{level, len(l.at[level])})
	l.at[level] = append(l.at[level], i)
}

func (l *levels) move(i, level int) {
	p := l.where[i]
	if p.level == level {
		return
	}
	from := l.at[p.level]
	last := from[len(from)-1]
	from[p.slot] = last
	l.where[last].slot = p.slot
	l.at[p.level] = from[:len(from)-1]
	l.where[i] = place{level, len(l.at[level])}
	l.at[level] = append(l.at[level], i)
}

// level is where a host with its present use belongs.
func (h *node) level() int {
	lowest := 1.0
	for k := range kinds {
		if h.limit[k] > 0 {
			lowest = min(lowest, 1-float64(h.used[k].Load())/float64(h.limit[k]))
		}
	}
	return int(max(0, lowest) * levelCount)
}

// tight appends at most n hosts to out that may have room for a need, those
// with the least free first.
func (f *Fleet) tight(need Amounts, n int, out []int) []int {
	share := 0.0
	for k := range kinds {
		if f.largest[k] > 0 {
			share = max(share, float64(need[k])/float64(f.largest[k]))
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for level := min(int(share*levelCount), levelCount); level <= levelCount && n > 0; level++ {
		at := f.levels.at[level]
		at = at[:min(n, len(at))]
		out, n = append(out, at...), n-len(at)
	}
	return out
}
