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

// plenty reports whether so many hosts in use have much room that opening
// another would only spread VMs thinner: above 1 in 400, and a few.
func (f *Fleet) plenty() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	roomy := 0
	for level := levelCount / 4; level < levelCount; level++ {
		roomy += len(f.levels.at[level])
	}
	return roomy > roomyFew+(len(f.hosts)-len(f.levels.at[levelCount]))/400
}

// roomyFew hosts with room are kept in use in any fleet, for choice.
const roomyFew = 2

// tight reports whether at most 1 host in tightPart, or one alone, has room for
// a large job.
func (f *Fleet) tight() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	roomy := 0
	for level := levelCount / largeShare; level <= levelCount; level++ {
		roomy += len(f.levels.at[level])
	}
	return roomy*tightPart < len(f.hosts)+tightPart
}

const (
	largeShare = 4  // a large job may take a quarter of a host
	tightPart  = 20 // hosts for each that is kept for one
)

// lowest is the lowest level of hosts that may have room for a need.
func (f *Fleet) lowest(need Amounts) int {
	share := 0.0
	for k := range kinds {
		if f.largest[k] > 0 {
			share = max(share, float64(need[k])/float64(f.largest[k]))
		}
	}
	return min(int(share*levelCount), levelCount)
}

// roomy appends every host that may have room for a need: in a full fleet few.
func (f *Fleet) roomy(need Amounts, out []int) []int {
	lowest := f.lowest(need)
	f.mu.Lock()
	defer f.mu.Unlock()
	for level := lowest; level <= levelCount; level++ {
		out = append(out, f.levels.at[level]...)
	}
	return out
}

// open appends at most n hosts in use to out that may have room for a need: half
// of them those with the least free, to be filled to the end, and half those with
// the most, which are the evenest.
func (f *Fleet) open(need Amounts, n int, out []int) []int {
	lowest := f.lowest(need)
	f.mu.Lock()
	defer f.mu.Unlock()
	take := func(level, left int) int {
		at := f.levels.at[level]
		at = at[:min(left, len(at))]
		out = append(out, at...)
		return left - len(at)
	}
	low := lowest
	for left := n / 2; low < levelCount && left > 0; low++ {
		left = take(low, left)
	}
	for level, left := levelCount-1, n-n/2; level >= low && left > 0; level-- {
		left = take(level, left)
	}
	return out
}
