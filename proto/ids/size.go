package ids

import (
	"fmt"
	"strconv"
	"strings"
)

// FormatSize writes a number of bytes as people read it: at most one decimal.
func FormatSize(n uint64) string {
	for _, u := range []struct {
		suffix string
		shift  uint
	}{{"TiB", 40}, {"GiB", 30}, {"MiB", 20}, {"KiB", 10}} {
		if n >= 1<<u.shift {
			v := float64(n) / float64(uint64(1)<<u.shift)
			return strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0") + " " + u.suffix
		}
	}
	return fmt.Sprintf("%d B", n)
}
