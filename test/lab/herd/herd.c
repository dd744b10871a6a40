/* SPDX-License-Identifier: Apache-2.0 */

/* Processes that look like QEMU's to who meters them: command line, names of
 * threads. `herd COUNT BUSY WORK_US REST_US THREADS` starts COUNT of them, each
 * with the threads of that list (names separated by commas) beside its first
 * one. In the first BUSY processes the vCPU threads work and rest in turn, and
 * one whose name begins with ~ starts threads that work and exit. It
 * prints the PIDs and "ready", and ends all of them when its input ends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long work_ns, rest_ns;
static pthread_barrier_t started;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void work(void)
{
	struct timespec now;
	long until = 0;

	do {
		clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
		if (!until)
			until = now.tv_sec * 1000000000L + now.tv_nsec + work_ns;
	} while (now.tv_sec * 1000000000L + now.tv_nsec < until);
}

static void *short_lived(void *name)
{
	prctl(PR_SET_NAME, name);
	work();
	return NULL;
}

static void *thread(void *name)
{
	struct timespec rest = {rest_ns / 1000000000, rest_ns % 1000000000};
	char *text = name;
	pthread_t id;

	prctl(PR_SET_NAME, text + (*text == '~'));
	pthread_barrier_wait(&started);
	while (work_ns && *text == '~') {
		if ((errno = pthread_create(&id, NULL, short_lived, text + 1)))
			die("create a thread");
		pthread_join(id, NULL);
		nanosleep(&rest, NULL);
	}
	while (work_ns && !strncmp(name, "CPU ", 4)) {
		work();
		nanosleep(&rest, NULL);
	}
	while (pause() < 0)
		;
	return NULL;
}

/* What a process of the herd is after its exec. HERD is what it is to do. */
static int be_one(char *what)
{
	pthread_attr_t attr;
	pthread_t id;
	char *name, *names;
	int count = 1;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	work_ns = strtol(what, &what, 10) * 1000;
	rest_ns = strtol(what + 1, &names, 10) * 1000;
	names++;
	for (char *c = names; *c; c++)
		count += *c == ',';
	pthread_barrier_init(&started, NULL, count + 1);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 64 << 10);
	for (name = strtok(names, ","); name; name = strtok(NULL, ","))
		if ((errno = pthread_create(&id, &attr, thread, name)))
			die("create a thread");
	pthread_barrier_wait(&started);
	if (write(3, "", 1) != 1)
		die("tell");
	close(3);
	while (pause() < 0)
		;
	return 0;
}

int main(int argc, char **argv)
{
	int tell[2], count, busy, *pids;
	char *what = getenv("HERD");
	char c;

	if (what)
		return be_one(what);
	if (argc != 6) {
		fprintf(stderr, "herd COUNT BUSY WORK_US REST_US THREADS\n");
		return 2;
	}
	count = atoi(argv[1]);
	busy = atoi(argv[2]);
	pids = calloc(count, sizeof(*pids));
	for (int i = 0; i < count; i++) {
		if (pipe(tell))
			die("pipe");
		pids[i] = fork();
		if (pids[i] < 0)
			die("fork");
		if (!pids[i]) {
			char name[64], uuid[64], env[1 << 17];

			snprintf(name, sizeof(name), "guest=herd-%d,debug-threads=on", i);
			snprintf(uuid, sizeof(uuid), "6e7d0000-0000-4000-8000-%012x", i);
			snprintf(env, sizeof(env), "HERD=%s %s %s", i < busy ? argv[3] : "0", argv[4], argv[5]);
			dup2(tell[1], 3);
			if (tell[0] != 3)
				close(tell[0]);
			if (tell[1] != 3)
				close(tell[1]);
			close(0);
			execle("/proc/self/exe", "/usr/bin/qemu-system-x86_64", "-name", name, "-uuid", uuid, "-m", "1", NULL,
			       (char *[]){env, NULL});
			die("exec");
		}
		close(tell[1]);
		if (read(tell[0], &c, 1) != 1)
			die("a process did not start");
		close(tell[0]);
		printf("%d\n", pids[i]);
	}
	printf("ready\n");
	fflush(stdout);
	while (read(0, &c, 1) > 0)
		;
	for (int i = 0; i < count; i++)
		kill(pids[i], SIGKILL);
	while (wait(NULL) > 0 || errno == EINTR)
		;
	return 0;
}
