/* Init and only program of the lab's Linux guest.
 *
 * It obeys commands that arrive on the second serial port, one a line:
 *
 *     @TOKEN COMMAND ARGUMENT... @TOKEN
 *
 * and answers with any number of "@TOKEN - text" lines and one last
 * "@TOKEN DONE rc" (0 done, 1 it failed, 2 no such command). The token is the
 * host's, new for each command, so that an answer cannot be taken for that of
 * another one; a line without it at both ends was cut and is not obeyed.
 * "bg COMMAND" is answered at once and runs beside the others.
 *
 * Each command does exactly what it says and nothing else in this guest sends a
 * packet or touches a disk, so that the host's counters can be compared to the
 * unit: the NIC has no address and no neighbours, frames are made here.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define MAX_WORDS 12
/* virtio-blk takes 126 segments a request: 256 KiB of single pages always fit. */
#define MAX_BLOCK (256 << 10)
#define MAX_PAYLOAD 1472

static int tty = -1;
static const char *token = "boot";

/* say writes one line of the answer in a single write, so that a background
 * command's lines are not mixed into it. */
static void say(const char *fmt, ...)
{
	char line[512];
	int n = snprintf(line, sizeof line, "@%s - ", token);
	va_list ap;

	va_start(ap, fmt);
	n += vsnprintf(line + n, sizeof line - n - 1, fmt, ap);
	va_end(ap);
	if (n > (int)sizeof line - 2)
		n = sizeof line - 2;
	line[n++] = '\n';
	if (write(tty, line, n) < 0)
		return;
}

static int fail(const char *what)
{
	say("%s: %s", what, strerror(errno));
	return 1;
}

/* number reads a whole non-negative number; -1 where the word is none. */
static long long number(const char *word)
{
	char *end;
	long long n = word && *word ? strtoll(word, &end, 10) : -1;

	return n >= 0 && *end == 0 ? n : -1;
}

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void spin(void)
{
	for (volatile int i = 0; i < 500; i++)
		;
}

static void sleep_ns(uint64_t ns)
{
	struct timespec t = {ns / 1000000000, ns % 1000000000};

	nanosleep(&t, NULL);
}

static int open_disk(const char *disk, int flags)
{
	char path[64];

	snprintf(path, sizeof path, "/dev/%s", disk);
	return open(path, flags);
}

/* blocks reads or writes count blocks, one O_DIRECT request each. */
static int blocks(int writing, const char *disk, long long size, long long count, long long first)
{
	void *buf;
	int fd;

	if (size <= 0 || size % 512 || size > MAX_BLOCK || count < 0 || first < 0) {
		say("want BS (a multiple of 512, at most %d) COUNT [FIRST] [DISK]", MAX_BLOCK);
		return 1;
	}
	fd = open_disk(disk, (writing ? O_WRONLY : O_RDONLY) | O_DIRECT);
	if (fd < 0)
		return fail(disk);
	if (posix_memalign(&buf, 4096, size)) {
		close(fd);
		errno = ENOMEM;
		return fail("buffer");
	}
	memset(buf, 0x6b, size);
	for (long long i = 0; i < count; i++) {
		off_t at = (first + i) * size;
		ssize_t n = writing ? pwrite(fd, buf, size, at) : pread(fd, buf, size, at);

		if (n != size) {
			say("%s: block %lld: %s", disk, first + i, n < 0 ? strerror(errno) : "past the end of the disk");
			free(buf);
			close(fd);
			return 1;
		}
	}
	free(buf);
	close(fd);
	say("%lld blocks of %lld bytes", count, size);
	return 0;
}

static int flush(const char *disk)
{
	int fd = open_disk(disk, O_WRONLY), rc = 0;

	if (fd < 0)
		return fail(disk);
	if (fsync(fd))
		rc = fail(disk);
	close(fd);
	return rc;
}

/* frames sends count UDP frames of 42 + size bytes from a NIC to an address that
 * nobody has, so that nothing is ever sent back. */
static int frames(const char *nic, long long count, long long size)
{
	static const uint8_t nobody[6] = {0x52, 0x54, 0, 0, 0, 1};
	struct frame {
		struct ether_header eth;
		struct iphdr ip;
		struct udphdr udp;
		uint8_t payload[MAX_PAYLOAD];
	} __attribute__((packed)) f;
	struct ifreq ifr = {0};
	struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP), .sll_halen = 6};
	size_t len = sizeof f - MAX_PAYLOAD + size;
	uint32_t sum = 0;
	int fd;

	if (count < 0 || size < 0 || size > MAX_PAYLOAD) {
		say("want COUNT SIZE (at most %d) [NIC]", MAX_PAYLOAD);
		return 1;
	}
	fd = socket(AF_PACKET, SOCK_RAW, 0);
	if (fd < 0)
		return fail("packet socket");
	snprintf(ifr.ifr_name, sizeof ifr.ifr_name, "%s", nic);
	if (ioctl(fd, SIOCGIFINDEX, &ifr) < 0) {
		close(fd);
		return fail(nic);
	}
	to.sll_ifindex = ifr.ifr_ifindex;
	ioctl(fd, SIOCGIFHWADDR, &ifr);
	memcpy(to.sll_addr, nobody, 6);

	memset(&f, 0, sizeof f);
	memcpy(f.eth.ether_dhost, nobody, 6);
	memcpy(f.eth.ether_shost, ifr.ifr_hwaddr.sa_data, 6);
	f.eth.ether_type = htons(ETH_P_IP);
	f.ip.version = 4;
	f.ip.ihl = 5;
	f.ip.ttl = 64;
	f.ip.protocol = IPPROTO_UDP;
	f.ip.tot_len = htons(len - sizeof f.eth);
	f.ip.saddr = inet_addr("198.18.0.1"); /* RFC 2544: for benchmarks, never routed */
	f.ip.daddr = inet_addr("198.18.0.2");
	for (size_t i = 0; i < sizeof f.ip / 2; i++)
		sum += ((uint16_t *)&f.ip)[i];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	f.ip.check = ~sum;
	f.udp.source = f.udp.dest = htons(9);
	f.udp.len = htons(sizeof f.udp + size);

	for (long long i = 0; i < count; i++) {
		while (sendto(fd, &f, len, 0, (void *)&to, sizeof to) < 0) {
			if (errno != ENOBUFS) {
				close(fd);
				return fail("send");
			}
			sleep_ns(1000000);
		}
	}
	close(fd);
	say("%lld frames of %zu bytes", count, len);
	return 0;
}

/* cpu is busy pct % of each 100 ms, for so many seconds of time, 0 = for ever. */
static int cpu(long long pct, long long seconds)
{
	const uint64_t period = 100000000;
	uint64_t start = clock_ns(CLOCK_MONOTONIC), now = start;

	if (pct < 0 || pct > 100 || seconds < 0) {
		say("want PCT (0 to 100) SECONDS (0 = for ever)");
		return 1;
	}
	while (!seconds || now - start < seconds * 1000000000ull) {
		uint64_t from = now;

		while ((now = clock_ns(CLOCK_MONOTONIC)) - from < period * pct / 100)
			spin();
		if (now - from < period)
			sleep_ns(period - (now - from));
		now = clock_ns(CLOCK_MONOTONIC);
	}
	return 0;
}

/* cpusec burns so many seconds (a decimal fraction will do) of this CPU. */
static int cpusec(const char *word)
{
	char *end;
	double seconds = word ? strtod(word, &end) : -1;
	uint64_t start = clock_ns(CLOCK_PROCESS_CPUTIME_ID), used;

	if (!word || *end || !(seconds >= 0 && seconds <= 86400)) {
		say("want SECONDS (0 to 86400)");
		return 1;
	}
	while ((used = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - start) < seconds * 1e9)
		spin();
	say("%llu ns", (unsigned long long)used);
	return 0;
}

/* mix is a load to look at: pct % CPU, and per second so many 4 KiB writes,
 * half as many reads, and frames of 1,000 bytes of payload. */
static int mix(const char *disk, long long pct, long long iops, long long pps, long long seconds)
{
	uint64_t start = clock_ns(CLOCK_MONOTONIC);

	if (pct < 0 || pct > 100 || iops < 0 || pps < 0 || seconds < 0) {
		say("want PCT IOPS PPS SECONDS (0 = for ever)");
		return 1;
	}
	tty = open("/dev/null", O_WRONLY);
	for (long long turn = 0; !seconds || turn < seconds; turn++) {
		uint64_t now, next = start + (turn + 1) * 1000000000ull;

		if ((iops && (blocks(1, disk, 4096, iops, 0) || blocks(0, disk, 4096, iops / 2, 0))) ||
		    (pps && frames("eth0", pps, 1000)))
			return 1;
		now = clock_ns(CLOCK_MONOTONIC);
		for (uint64_t until = now + pct * 10000000; (now = clock_ns(CLOCK_MONOTONIC)) < until;)
			spin();
		if (now < next)
			sleep_ns(next - now);
	}
	return 0;
}

/* mem holds so many MiB in use, all of them touched; 0 gives them back. */
static int mem(long long mib)
{
	static void *held;
	static size_t len;

	if (mib < 0 || mib > 1 << 20) {
		say("want MIB");
		return 1;
	}
	if (held)
		munmap(held, len);
	held = NULL;
	len = (size_t)mib << 20;
	if (!len)
		return 0;
	held = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (held == MAP_FAILED) {
		held = NULL;
		return fail("mem");
	}
	memset(held, 0x6b, len);
	return 0;
}

/* lines says those lines of a file that contain what. */
static void lines(const char *path, const char *what)
{
	char line[400];
	FILE *f = fopen(path, "r");

	if (!f)
		return;
	while (fgets(line, sizeof line, f)) {
		line[strcspn(line, "\n")] = 0;
		if (strstr(line, what))
			say("%s", line);
	}
	fclose(f);
}

static int stat_all(void)
{
	lines("/proc/diskstats", " vd");
	lines("/proc/net/dev", "eth");
	lines("/proc/stat", "cpu");
	lines("/proc/uptime", "");
	lines("/proc/meminfo", "Mem");
	return 0;
}

static int run(int n, char **w)
{
	const char *disk = "vda", *nic = "eth0";

	/* The last word may name a disk or a NIC. */
	if (n > 1 && !strncmp(w[n - 1], "vd", 2))
		disk = w[--n];
	else if (n > 1 && !strncmp(w[n - 1], "eth", 3))
		nic = w[--n];
	w[n] = NULL;
	if (!strcmp(w[0], "true") || !strcmp(w[0], "off"))
		return 0;
	if (!strcmp(w[0], "write") || !strcmp(w[0], "read"))
		return blocks(w[0][0] == 'w', disk, number(n > 1 ? w[1] : 0), number(n > 2 ? w[2] : 0), n > 3 ? number(w[3]) : 0);
	if (!strcmp(w[0], "flush"))
		return flush(disk);
	if (!strcmp(w[0], "udp"))
		return frames(nic, number(n > 1 ? w[1] : 0), number(n > 2 ? w[2] : 0));
	if (!strcmp(w[0], "cpu"))
		return cpu(number(n > 1 ? w[1] : 0), number(n > 2 ? w[2] : 0));
	if (!strcmp(w[0], "cpusec"))
		return cpusec(w[1]);
	if (!strcmp(w[0], "mix"))
		return mix(disk, number(n > 1 ? w[1] : 0), number(n > 2 ? w[2] : 0), number(n > 3 ? w[3] : 0), number(n > 4 ? w[4] : 0));
	if (!strcmp(w[0], "mem"))
		return mem(number(n > 1 ? w[1] : 0));
	if (!strcmp(w[0], "stat"))
		return stat_all();
	say("no such command: %s; there are write read flush udp cpu cpusec mix mem stat off true, and bg before one", w[0]);
	return 2;
}

static void obey(char *line)
{
	char *w[MAX_WORDS + 1], answer[64];
	int n = 0, rc;

	if (line[0] != '@')
		return;
	for (char *p = strtok(line + 1, " "); p && n < MAX_WORDS; p = strtok(NULL, " "))
		w[n++] = p;
	w[n] = NULL;
	if (n < 3 || w[n - 1][0] != '@' || strcmp(w[0], w[n - 1] + 1))
		return;
	w[--n] = NULL;
	token = w[0];
	if (!strcmp(w[1], "bg") && n > 2) {
		rc = fork();
		if (rc == 0) {
			tty = open("/dev/null", O_WRONLY);
			_exit(run(n - 2, w + 2));
		}
		rc = rc < 0 ? fail("fork") : 0;
	} else {
		rc = run(n - 1, w + 1);
	}
	snprintf(answer, sizeof answer, "@%.40s DONE %d\n", token, rc);
	if (write(tty, answer, strlen(answer)) < 0)
		return;
	if (!strcmp(w[1], "off")) {
		tcdrain(tty);
		reboot(RB_POWER_OFF);
	}
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
}

/* load inserts the modules of /m, which are numbered in the order of need. */
static void load(void)
{
	char path[32];

	for (int i = 0;; i++) {
		int fd;

		snprintf(path, sizeof path, "/m/%02d.ko", i);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			return;
		if (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)
			fprintf(stderr, "insert %s: %s\n", path, strerror(errno));
		close(fd);
	}
}

/* up brings all NICs up without an address: what arrives is dropped, and nothing
 * is answered. IPv6 is off by the kernel's command line. */
static void up(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	for (int i = 0; i < 8; i++) {
		struct ifreq ifr = {0};

		snprintf(ifr.ifr_name, sizeof ifr.ifr_name, "eth%d", i);
		if (ioctl(fd, SIOCGIFFLAGS, &ifr))
			break;
		ifr.ifr_flags |= IFF_UP;
		ifr.ifr_flags &= ~IFF_MULTICAST;
		ioctl(fd, SIOCSIFFLAGS, &ifr);
	}
	close(fd);
}

int main(void)
{
	struct termios raw;
	char line[512];
	size_t len = 0;
	char c;

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sys", "/sys", "sysfs", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	load();
	up();
	tty = open("/dev/ttyS1", O_RDWR | O_NOCTTY);
	if (tty < 0 || tcgetattr(tty, &raw)) {
		perror("ttyS1");
		reboot(RB_POWER_OFF);
	}
	cfmakeraw(&raw);
	cfsetspeed(&raw, B115200);
	tcsetattr(tty, TCSAFLUSH, &raw);
	say("READY");
	while (read(tty, &c, 1) == 1) {
		if (c == '\n') {
			line[len] = 0;
			obey(line);
			len = 0;
		} else if (len < sizeof line - 1) {
			line[len++] = c;
		}
	}
	return 0;
}
